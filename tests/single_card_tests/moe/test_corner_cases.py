"""Routing to a single expert, and experts that no token chose."""

import numpy as np
import paddle
import pytest
from reference import tiny_configs

from paddledsv4.config import ModelConfig
from paddledsv4.moe.experts import Experts
from paddledsv4.moe.router import HashRouter, LearnedRouter
from paddledsv4.numerics.policy import Policy
from paddledsv4.transformer.build import AuxiliaryLosses, Build, ForwardContext


@pytest.fixture(params=["paddle", "plain", "megatron", "torch"])
def preset(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="the torch preset needs paddledsv4[torch]")
    return request.param


def tiny_build(preset, **changes):
    return Build(ModelConfig.from_dict(tiny_configs()[0].model_dump() | changes), Policy.preset(preset))


def weights_of_chosen(router, seed=0):
    paddle.seed(seed)
    x, ids = paddle.randn([6, 2, 128]), paddle.randint(0, 512, [2, 6])
    probs, chosen = router(x, ForwardContext(ids, AuxiliaryLosses()))
    assert chosen.astype("int64").sum(1).tolist() == [1] * 12
    affinity = np.sqrt(np.log1p(np.exp(x.reshape([12, 128]).numpy() @ router.weight.numpy().T)))
    return probs.numpy()[chosen.numpy()], affinity[chosen.numpy()]


def test_single_choice_of_a_learned_router_keeps_its_affinity(preset):
    weights, affinity = weights_of_chosen(LearnedRouter(tiny_build(preset, num_experts_per_tok=1)))
    np.testing.assert_allclose(weights, 1.5 * affinity, rtol=1e-5)


def test_single_choice_of_a_hash_router_weighs_one(preset):
    weights, affinity = weights_of_chosen(HashRouter(tiny_build(preset, num_experts_per_tok=1)))
    np.testing.assert_allclose(weights, 1.5, rtol=1e-6)
    assert abs(affinity - 1).min() > 0.01


def test_an_expert_without_tokens_gets_a_zero_gradient(preset):
    experts = Experts(tiny_build(preset))
    rows, probs = paddle.randn([5, 128]), paddle.rand([5])
    rows.stop_gradient = False
    counts = paddle.to_tensor([0, 2, 0, 0, 3, 0, 0, 0])
    out = experts(rows, probs, counts)
    assert out.shape == [5, 128]
    out.sum().backward()
    assert np.abs(rows.grad.numpy()).min(-1).max() > 0
    for count, expert in zip(counts.tolist(), experts.local_experts.values(), strict=True):
        gradient = expert.linear_fc1.weight.grad
        assert gradient is not None and np.isfinite(gradient.numpy()).all()
        assert (np.abs(gradient.numpy()).max() > 0) == (count > 0)
