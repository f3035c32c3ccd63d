"""Rounding of caches in training: recorded cases, the formats' own tables, straight-through gradients."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nan_traps import array, golden, leaf

from paddledsv4.ops.fake_quantize import FORMATS, fake_quantize, quantizer
from paddledsv4.weights import fp8, mxfp4

RECORDED = [("kvqat.x", "ue8m0", "kvqat.ue8m0_block64"), ("kvqat.x", "fp32_scale", "kvqat.fp32scale_block64"),
            ("idxqat.x", "fp4", "idxqat.fp4_block32")]  # fmt: skip
every_format = pytest.mark.parametrize("name", FORMATS)


def by_table(x: np.ndarray, name: str) -> np.ndarray:
    """The formula in numpy, with the encoders and tables that read released weights. x float32 [n, D]."""
    form = FORMATS[name]
    padded = np.zeros((len(x), -(-x.shape[1] // form.block) * form.block), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, form.block)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(form.floor)) * np.float32(1 / form.largest)
    if form.power_of_two:
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
    scaled = np.clip(blocks / scale, -form.largest, form.largest)
    if name == "fp4":
        sizes = mxfp4.MAGNITUDES
        distance = np.abs(np.abs(scaled)[..., None] - sizes)
        tie = (distance == distance.min(-1, keepdims=True)) * (1 + (np.arange(8) % 2 == 0))  # even mantissas first
        rounded = np.copysign(sizes[tie.argmax(-1)], scaled)
    else:
        rounded = fp8.E4M3[fp8.encode(scaled)]
    return (rounded * scale).reshape(padded.shape)[:, : x.shape[1]]


@pytest.mark.parametrize(("x", "name", "y"), RECORDED)
def test_recorded_cases(x, name, y):
    found = fake_quantize(golden()[x], FORMATS[name])
    assert found.dtype == golden()[y].dtype
    np.testing.assert_array_equal(array(found), array(golden()[y]))


def test_a_wrong_format_is_found():
    """What one implementation did, which cast to the wrong dtype: no rounding to FP8 at all."""
    unrounded = array(golden()["kvqat.miles_167ced7_as_written"])
    assert all((array(fake_quantize(golden()["kvqat.x"], FORMATS[name])) != unrounded).any() for name in FORMATS)
    assert (array(golden()["kvqat.ue8m0_block64"]) != array(golden()["kvqat.fp32scale_block64"])).any()


@every_format
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([1e-30, 1e-6, 1.0, 300.0, 1e30]))
def test_it_is_the_formula(name, seed, width, size):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, width)) * size * np.exp2(rng.integers(-12, 3, (3, width)))).astype(np.float32)
    steps = np.exp2(rng.integers(-8, 9, x.shape)) * rng.integers(-16, 17, x.shape) / 16  # ties and the format's numbers
    x = np.where(rng.random(x.shape) < 0.5, steps, x).astype(np.float32)
    np.testing.assert_array_equal(array(fake_quantize(paddle.to_tensor(x), FORMATS[name])), by_table(x, name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@every_format
def test_gradients_pass_straight_through_and_inputs_stay(name, dtype):
    paddle.seed(1)
    x, dy = leaf(paddle.randn([5, 2, 80]), dtype), paddle.randn([5, 2, 80]).astype(dtype)
    before = array(x)
    y = quantizer(name, kept=8)(x)
    y.backward(dy)
    assert x.grad.dtype == y.dtype == x.dtype
    np.testing.assert_array_equal(array(x.grad), array(dy))
    np.testing.assert_array_equal(array(x), before)
    np.testing.assert_array_equal(array(y)[..., 72:], before[..., 72:])
    assert (array(y)[..., :72] != before[..., :72]).mean() > 0.9
    widest = array(fake_quantize(x.detach()[..., :72].contiguous(), FORMATS[name]))
    np.testing.assert_array_equal(array(y)[..., :72], widest)


@pytest.mark.parametrize("name", ["ue8m0", "fp4"])
def test_twice_is_once(name):
    """Where scales are powers of two, what has been rounded is exact; a smaller scale would fit it as well."""
    once = fake_quantize(paddle.randn([64, 128]), FORMATS[name])
    np.testing.assert_array_equal(array(fake_quantize(once, FORMATS[name])), array(once))


@every_format
def test_what_is_not_finite_stays_so(name):
    x = paddle.randn([3, 128])
    x[0, 5], x[1, 70], x[1, 7] = float("nan"), float("inf"), float("-inf")
    y = array(fake_quantize(x, FORMATS[name]))
    assert np.isnan(y[0, 5]) and not np.isfinite(y[1, [70, 7]]).any() and np.isfinite(y[2]).all()


@every_format
def test_zeros_and_rows_that_are_all_rotary(name):
    assert (array(fake_quantize(paddle.zeros([2, 70]), FORMATS[name])) == 0).all()
    x = paddle.randn([2, 8])
    np.testing.assert_array_equal(array(fake_quantize(x, FORMATS[name], kept=8)), array(x))


def test_off_is_the_tensor_itself():
    x = paddle.randn([2, 70])
    assert quantizer("off", kept=8)(x) is x
