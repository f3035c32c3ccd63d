"""float64 separates formula errors from rounding: two orders of operations must agree to 1e-12."""

import numpy as np
from reference import TINY, tiny_configs
from safetensors.numpy import load_file

from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer


def losses(preset: str) -> np.ndarray:
    model, train = tiny_configs()
    tokens = np.load(TINY / "tokens.npy")
    trainer = Trainer(model, train, Policy.preset(preset), tokens, load_file(TINY / "init.safetensors"), "fp64")
    return np.array([[(x.main, x.mtp) for x in step.losses] for step in trainer.train(2)])


def test_two_orders_agree():
    native, plain = losses("paddle"), losses("plain")
    print("largest difference", np.abs(native - plain).max())
    np.testing.assert_allclose(native, plain, rtol=0, atol=1e-12)
    assert not np.array_equal(native, plain), "the two orders are the same: this test could not fail"
