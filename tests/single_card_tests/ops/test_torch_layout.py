"""Ops of the torch preset whose bits depend on more than the formula, against torch computations written here."""

import paddle
import pytest
from reference import tiny_configs

from paddledsv4.config import ModelConfig
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.transformer.rotary import RotaryEmbedding

torch = pytest.importorskip("torch", reason="the torch preset needs paddledsv4[torch]")

OPS = load_all()


def sinkhorn(logits, iterations):
    m = torch.softmax(logits, -1) + 1e-6
    m = m / (m.sum(-2, keepdim=True) + 1e-6)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + 1e-6)
        m = m / (m.sum(-2, keepdim=True) + 1e-6)
    return m


def test_sinkhorn_gradient_of_five_streams():
    """torch adds the entries of a row of five in an order that depends on where they lie in memory."""
    torch.manual_seed(0)
    logits, streams, upstream = torch.randn(64, 5, 5), torch.randn(64, 5, 90), torch.randn(64, 5, 90)
    expected = logits.clone().requires_grad_()
    mixing = sinkhorn(expected, 3)
    mixing.retain_grad()
    torch.bmm(mixing.transpose(1, 2), streams).backward(upstream)  # as the hyper-connection uses it

    x = paddle.to_tensor(logits.numpy().reshape([32, 2, 5, 5]), stop_gradient=False)
    seed = paddle.to_tensor(mixing.grad.contiguous().numpy().reshape(x.shape))
    OPS["sinkhorn"].variants["torch"].function(x, 3, 1e-6, "float32").backward(seed)
    assert x.grad.numpy().tobytes() == expected.grad.numpy().tobytes()

    packed = logits.clone().requires_grad_()
    sinkhorn(packed, 3).backward(mixing.grad.contiguous())
    assert not torch.equal(packed.grad, expected.grad)  # the test can tell the layouts apart


def yarn_frequencies(dim, base, factor, low, high):
    power = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    mask = 1.0 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return 1.0 / (factor * power) * (1 - mask) + 1.0 / power * mask


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_yarn_mixes_at_every_factor(factor):
    """At factor 1 both frequencies are equal, and mixing them still rounds."""
    values = tiny_configs()[0].model_dump()
    values["qk_rope_head_dim"] = 10
    values["rope_scaling"]["factor"] = factor
    config, ops = ModelConfig.from_dict(values), Policy.preset("torch").ops()
    rotary = RotaryEmbedding.for_ratio(config, 4)
    cos, sin = rotary.table(ops, 500, "float32")
    low, high = 2, 5  # 10 ln(65536 / (2 pi beta)) / (2 ln 40000) = 2.73 and 4.37 for beta = 32 and 1
    frequencies = yarn_frequencies(10, 40000.0, factor, low, high)
    angles = torch.outer(torch.arange(500, dtype=torch.float32), frequencies)
    assert cos.numpy().tobytes() == torch.cos(angles).numpy().tobytes()
    assert sin.numpy().tobytes() == torch.sin(angles).numpy().tobytes()
