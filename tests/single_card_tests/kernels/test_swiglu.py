"""The fused clamped SwiGLU against its definition in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import fused, is_the_definition, normal, plant, same_bits  # noqa: E402
from poison import poisoned  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("poisoned")
LIMIT = {"limit": 10.0}


def inputs(shape, dtype="float32"):
    """Some numbers beyond the clamps."""
    paddle.seed(0)
    return [normal(*shape, dtype=dtype, scale=8), paddle.rand(shape[:-1])]


@pytest.mark.parametrize("shape", [[1, 2], [5, 74], [2, 3, 128], [3, 4100]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_definition(shape, dtype):
    x, prob = inputs(shape, dtype)
    assert is_the_definition("swiglu", "plain", [x, prob], LIMIT)
    assert is_the_definition("swiglu", "plain", [x, None], LIMIT)


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("argument, change", [("limit", lambda c: c - 1), ("F", lambda f: f - 1)])
def test_a_bug_is_seen(monkeypatch, kernel, argument, change):
    plant(monkeypatch, kernel, argument, change)
    assert not is_the_definition("swiglu", "plain", inputs([5, 74]), LIMIT)


def test_on_the_bound_the_gradient_passes():
    x = paddle.to_tensor([[10.0, 10.0, 11.0, 1.0, 10.0, -10.0, -10.5, 10.5]])
    x.stop_gradient = False
    fused("swiglu")(x, None, 10.0).sum().backward()
    assert (x.grad.numpy() != 0).tolist() == [[True, True, False, True, True, True, False, False]]


def test_nan_stays_nan():
    x = paddle.to_tensor([[float("nan"), 1.0, 2.0, float("nan")]])
    assert np.isnan(fused("swiglu")(x, None, 10.0).numpy()).all()


def test_an_expert_without_tokens():
    x, prob = paddle.zeros([0, 8]), paddle.zeros([0])
    x.stop_gradient = prob.stop_gradient = False
    y = fused("swiglu")(x, prob, 10.0)
    y.sum().backward()
    assert y.shape == [0, 4] and x.grad.shape == [0, 8] and prob.grad.shape == [0]


def test_every_run_gives_the_same_bits():
    assert same_bits("swiglu", inputs([9, 200], "bfloat16"), LIMIT)
