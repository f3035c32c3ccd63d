"""The fused head and loss against the two ops, their formula in float64, and the memory that it saves."""

import subprocess
import sys
from unittest import mock

import numpy as np
import paddle
import pytest

from paddledsv4.fusions import linear_cross_entropy as module
from paddledsv4.numerics.registry import load_all

OPS = load_all()
VARIANTS = module.linear_cross_entropy.variants
SHAPES = [(256, 2, 128, 512), (100, 3, 96, 1000), (77, 1, 64, 391), (3, 1, 32, 40)]  # s, b, C, V; odd ones with rests


def inputs(shape, dtype="float32"):
    s, b, width, vocabulary = shape
    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocabulary, (b, s))
    labels[:, :2] = 0, vocabulary - 1
    arrays = rng.standard_normal((s, b, width)), 0.3 * rng.standard_normal((vocabulary, width)), rng.random((b, s))
    hidden, weight, seed = (x.astype(dtype) for x in arrays)
    return hidden, weight, labels, seed


def results(function, hidden, weight, labels, seed):
    """Losses and both gradients."""
    hidden, weight = (paddle.to_tensor(x, stop_gradient=False) for x in (hidden, weight))
    losses = function(hidden, weight, paddle.to_tensor(labels))
    paddle.autograd.backward([losses], [paddle.to_tensor(seed)])
    return [x.numpy() for x in (losses, hidden.grad, weight.grad)]


def two_ops(preset):
    linear, loss = (OPS[op].variants[preset].function for op in ("linear", "cross_entropy"))
    return lambda hidden, weight, labels: loss(linear(hidden, weight), labels)


@pytest.fixture(autouse=True)
def small_blocks():
    with mock.patch.object(module, "BLOCK", 1 << 15):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", ["megatron", "torch"])
def test_megatrons_order_has_the_bits_of_the_two_ops(preset, shape):
    ours, expected = (results(f, *inputs(shape)) for f in (VARIANTS[preset].function, two_ops(preset)))
    for name, a, b in zip(("loss", "dx", "dW"), ours, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_the_equality_can_fail():
    """Blocks that leave a rest of few rows to other GEMM kernels."""

    def naive(total, width):
        return [slice(i, min(i + 64, total)) for i in range(0, total, 64)]

    shape = (77, 1, 64, 391)
    with mock.patch.object(module, "blocks", naive):
        ours = results(VARIANTS["torch"].function, *inputs(shape))
    expected = results(two_ops("torch"), *inputs(shape))
    assert any((a != b).any() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "fused"])  # which has tests of its own
def test_every_variant_is_the_formula(name, shape):
    dtype, bound = ("float64", 1e-12) if name != "torch" else ("float32", 1e-5)
    hidden, weight, labels, seed = inputs(shape, dtype)
    logits = np.einsum("sbc,vc->bsv", hidden.astype("float64"), weight)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    label = np.eye(shape[3])[labels]
    g = (p - label) * seed[..., None]
    expected = -np.log((p * label).sum(-1)), np.einsum("bsv,vc->sbc", g, weight), np.einsum("bsv,sbc->vc", g, hidden)
    for ours, exact in zip(results(VARIANTS[name].function, hidden, weight, labels, seed), expected, strict=True):
        assert np.linalg.norm(ours - exact) <= bound * np.linalg.norm(exact)


@pytest.mark.parametrize("total", [1, 63, 64, 65, 127, 128, 1000])
def test_blocks_cover_everything_once_and_none_is_short(total):
    found = module.blocks(total, 512)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(total))
    assert all(part.stop - part.start >= min(64, total) for part in found)


SCRIPT = """
from paddledsv4.host import prepare_host
prepare_host()
import paddle
from paddledsv4.fusions import linear_cross_entropy as fused
from paddledsv4.numerics.registry import load_all
ops = load_all()
fused.BLOCK = 1 << 20
hidden, weight = paddle.randn([512, 2, 32]), paddle.randn([8000, 32])
hidden.stop_gradient = weight.stop_gradient = False
labels = paddle.randint(0, 8000, [2, 512])
linear, loss = (ops[op].variants["paddle"].function for op in ("linear", "cross_entropy"))
two = lambda hidden, weight, labels: loss(linear(hidden, weight), labels)
function = {function}
paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
function(hidden, weight, labels).sum().backward()
print(paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - before)
"""


def peak_bytes(function: str) -> int:
    command = [sys.executable, "-c", SCRIPT.format(function=function)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_the_logits_never_exist_at_once():
    logits = 4 * 1024 * 8000
    fused, two = (
        peak_bytes(function) for function in ("fused.linear_cross_entropy.variants['paddle'].function", "two")
    )
    print(f"logits {logits / 1e6:.1f} MB; two ops {two / 1e6:.1f} MB, fused {fused / 1e6:.1f} MB")
    assert two > 2 * logits  # the check can fail
    assert fused < logits
