"""The fused RMS normalisation against its definition in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from paddledsv4.numerics.registry import load_all  # noqa: E402
from paddledsv4.ops.rms_norm import plain_rms_norm  # noqa: E402

fused = load_all()["rms_norm"].variants["fused"].function


def values(shape, dtype):
    return (paddle.randn(shape) * 3).astype(dtype).detach()


def run(function, x, weight, dy, dtype):
    x, weight = (t.astype(dtype).detach() for t in (x, weight))
    x.stop_gradient = weight.stop_gradient = False
    y = function(x, weight, 1e-6)
    y.backward(dy.astype(dtype))
    return [t.astype("float64").numpy() for t in (y, x.grad, weight.grad)]


@pytest.mark.parametrize("shape", [[1, 16], [5, 37], [2, 19, 64], [40, 129]])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_it_is_the_definition(shape, dtype, bound):
    paddle.seed(0)
    x, weight, dy = values(shape, dtype), values(shape[-1:], dtype), values(shape, dtype)
    ours, truth = run(fused, x, weight, dy, dtype), run(plain_rms_norm, x, weight, dy, "float64")
    for got, expected in zip(ours, truth, strict=True):
        assert np.linalg.norm(got - expected) <= bound * np.linalg.norm(expected)
