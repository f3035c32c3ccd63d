"""The model's switch between head and loss as two ops and as one."""

from unittest import mock

import numpy as np
import pytest
from reference import BUNDLES, initial_state, tiny_configs

from paddledsv4.distributed.group import ALONE, Group
from paddledsv4.errors import UserError
from paddledsv4.fusions import linear_cross_entropy
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer


def steps(policy: Policy, fused: bool, count: int = 2, block: int = 1 << 16) -> tuple[list, str]:
    model, train = tiny_configs()
    train = train.replace(linear_cross_entropy=fused, sequence_length=64)
    tokens = np.load(BUNDLES / "tiny-fp32" / "tokens.npy")[:, :65]
    trainer = Trainer(model, train, policy, tokens, initial_state())
    with mock.patch.object(linear_cross_entropy, "BLOCK", block):
        results = list(trainer.train(count))
    return [(loss.main, loss.mtp) for result in results for loss in result.losses], trainer.weights_md5()


@pytest.mark.parametrize("preset", ["torch", pytest.param("megatron", marks=pytest.mark.slow)])
def test_steps_are_bit_equal_with_and_without_it(preset):
    if preset == "torch":
        pytest.importorskip("torch")
    policy = Policy.preset(preset)
    assert steps(policy, True) == steps(policy, False)


def test_it_follows_the_switch_of_the_loss():
    """The equality above can fail: the other order has other bits."""
    ours = steps(Policy.preset("megatron", {"cross_entropy": "paddle"}), True, 1)
    theirs = steps(Policy.preset("megatron"), True, 1)
    assert ours != theirs and np.allclose(ours[0], theirs[0], rtol=1e-5)


def test_tensor_ranks_are_refused():
    groups = ALONE.__class__(**{name: getattr(ALONE, name) for name in ALONE.__dataclass_fields__}
                             | {"tensor": Group("tensor", (0, 1))})  # fmt: skip
    with pytest.raises(UserError, match=r"not with parallel.tensor > 1.*set it to false"):
        DeepseekV4Model(tiny_configs()[0], Policy.preset("paddle"), groups=groups, linear_cross_entropy=True)
