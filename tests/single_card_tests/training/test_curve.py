"""The 100-step curve against the recorded one, inside the band that two legal roundings of ours span.

Chaos amplifies rounding: runs of the same formulas with other roundings drift apart by a few thousandths. How far is
measured on the spot, between our native and our plain variants, and the reference must not be further away than
twice that, in the largest and in the mean difference of a loss.
"""

import numpy as np
import pytest
from reference import TINY, tiny_configs
from safetensors.numpy import load_file
from test_first_steps import recorded_losses

from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer


def curve(preset: str, steps: int) -> np.ndarray:
    tokens = np.load(TINY / "tokens.npy")
    trainer = Trainer(*tiny_configs(), Policy.preset(preset), tokens, load_file(TINY / "init.safetensors"))
    return np.array([[(x.main, x.mtp) for x in step.losses] for step in trainer.train(steps)])


@pytest.mark.slow
def test_hundred_steps_stay_in_the_band():
    native, plain, recorded = curve("paddle", 100), curve("plain", 100), recorded_losses(100)
    band, distance = np.abs(native - plain), np.abs(native - recorded)
    print("band max", band.max(), "mean", band.mean(), "; distance max", distance.max(), "mean", distance.mean())
    assert distance.max() < 2 * band.max()
    assert distance.mean() < 2 * band.mean()
