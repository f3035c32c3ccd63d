"""Is every number finite? In every dtype, on both sides of the size where the kernel changes."""

import math

import numpy as np
import paddle
import pytest

from paddledsv4.observe.finite import SMALL, described, is_finite, kind

LARGEST = {"float32": 3.4e38, "float64": 1.7e308, "bfloat16": 3.3e38, "float16": 65504}


@pytest.mark.parametrize("size", [1, 7, SMALL, SMALL + 1])
@pytest.mark.parametrize("dtype", LARGEST)
def test_one_element_is_enough(dtype, size):
    good = paddle.full([size], LARGEST[dtype], dtype)  # whose sum overflows
    assert is_finite(good) and is_finite(-good)
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, size // 2, size - 1}:
            bad = np.full(size, 1.0)
            bad[place] = value
            assert not is_finite(paddle.to_tensor(bad).astype(dtype))
    if size > 1:  # infinities that cancel
        assert not is_finite(paddle.to_tensor([math.inf, -math.inf] + [0.0] * (size - 2)).astype(dtype))


def test_what_is_no_float_is_finite():
    assert is_finite(paddle.ones([2], "int64")) and is_finite(paddle.ones([2], "bool")) and is_finite(None)
    assert is_finite(3) and is_finite(1.5) and is_finite("x") and is_finite(paddle.zeros([0]))
    assert not is_finite(math.nan) and not is_finite(math.inf)


def test_in_words():
    x = paddle.to_tensor([[1.0, 2.0], [math.inf, math.nan]])
    assert described(x) == "2 of 4 numbers are not finite (inf at [1, 0])"
    assert described(paddle.to_tensor(math.nan)) == "1 of 1 numbers is not finite (nan at [])"
    assert described(math.inf) == "it is inf"
    assert kind(x.astype("bfloat16")) == "bfloat16 [2, 2]" and kind(2.5) == "float"


def test_asking_leaves_no_graph():
    x = paddle.ones([SMALL + 1])
    x.stop_gradient = False
    y = x * 2
    assert is_finite(y)
    y.sum().backward()
    assert (x.grad == 2).all()
