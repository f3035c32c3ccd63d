"""Rotation makes a new tensor: no variant writes into its input or into a gradient it is given."""

import numpy as np
import paddle
import pytest
from nan_traps import array, function, golden, leaf, variants

from paddledsv4.numerics.function import differentiable

every_variant = pytest.mark.parametrize("variant", variants("rope"))


def angles() -> list[paddle.Tensor]:
    """cos and sin [40, 32] of the recorded case."""
    return [golden()["rope.freqs"][:, :, part].contiguous() for part in (0, 1)]


@differentiable
def handing_back(y, gradient):
    """A consumer whose gradient is this very tensor; backward() alone would pass on a copy."""
    return y.sum(), lambda _: (gradient,)


def turned(call, dtype="float32", inverse=False) -> np.ndarray:
    """The recorded input, rotated; raises if a tensor that went in has changed."""
    x, cos, sin = leaf(golden()["rope.x"].transpose([1, 0, 2, 3]), dtype), *angles()
    before = [t.detach().clone() for t in (x, cos, sin)]
    y = call(x, cos, sin, inverse=inverse)
    after, dy = y.detach().clone(), paddle.randn(y.shape).astype(dtype)
    given = dy.clone()
    handing_back(y, gradient=dy).backward()
    names, now = ("x", "cos", "sin", "dy", "y"), (x, cos, sin, dy, y)
    for name, one, other in zip(names, (*before, given, after), now, strict=True):
        np.testing.assert_array_equal(array(other), array(one), f"{name} was written to")
    assert x.grad.dtype == y.dtype == x.dtype
    y.detach().fill_(7.0)  # nor does the result share its memory
    np.testing.assert_array_equal(array(x), array(before[0]), "x and y share memory")
    return array(after)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("inverse", [False, True])
def test_inputs_stay(variant, dtype, inverse):
    turned(function(variant, dtype), dtype, inverse)


@every_variant
def test_the_recorded_case(variant):
    recorded = array(golden()["rope.y"].transpose([1, 0, 2, 3]))
    np.testing.assert_allclose(turned(variant.function), recorded, 1e-6, 1e-6)
    back = variant.function(paddle.to_tensor(recorded), *angles(), inverse=True)
    np.testing.assert_allclose(array(back), array(golden()["rope.x"].transpose([1, 0, 2, 3])), 1e-6, 1e-6)


@differentiable
def in_place(x, cos, sin, inverse=False):
    """The trap: the result is written over the input, and the gradient over the one that came."""

    def rotate(x, sin):
        pairs = x.reshape([*x.shape[:-1], -1, 2])
        wide = [t.reshape([cos.shape[0], *[1] * (x.ndim - 2), -1]) for t in (cos, sin)]
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = paddle.stack([even * wide[0] - odd * wide[1], odd * wide[0] + even * wide[1]], -1)
        paddle.assign(turned.reshape(x.shape), x)
        return turned.reshape(x.shape)

    sin = -sin if inverse else sin
    return rotate(x, sin), lambda dy: (rotate(dy, -sin), None, None)


def test_writing_in_place_is_found():
    with pytest.raises(AssertionError, match="x was written to"):
        turned(in_place)


def test_a_gradient_written_in_place_is_found():
    @differentiable
    def backward_in_place(x, cos, sin, inverse=False):
        y, backward = in_place.forward_and_backward(x.clone(), cos, sin, inverse)
        return y, backward

    with pytest.raises(AssertionError, match="dy was written to"):
        turned(backward_in_place)
