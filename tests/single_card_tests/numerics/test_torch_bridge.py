"""Tensors that cross between Paddle and torch: one memory, nothing lost on the way."""

import gc
import sys

import numpy as np
import paddle
import pytest

torch = pytest.importorskip("torch")

from paddledsv4.numerics.torch_kernels import to_paddle, to_torch  # noqa: E402

CALLS = 1000


def kept(convert) -> int:
    """Blocks of Python's memory that so many calls have kept."""
    for _ in range(CALLS):
        convert()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(CALLS):
        convert()
    gc.collect()
    return sys.getallocatedblocks() - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int64", "int32", "bool"])
def test_there_and_back_is_the_same_memory(dtype):
    x = paddle.to_tensor(np.arange(6).reshape(2, 3)).astype(dtype)
    t = to_torch(x)
    back = to_paddle(t.clone())
    assert t.data_ptr() == x.data_ptr() and str(t.dtype) == f"torch.{dtype}"
    assert back.dtype == x.dtype and back.shape == x.shape and back.place == x.place and back.stop_gradient
    assert back.numpy().tobytes() == x.numpy().tobytes()


def test_two_of_them_are_two():
    a, b = to_paddle(torch.zeros(2, 3)), to_paddle(torch.ones(4, dtype=torch.int64))
    assert (a.shape, a.dtype, a.sum().item()) == ([2, 3], paddle.float32, 0.0)
    assert (b.shape, b.dtype, b.sum().item()) == ([4], paddle.int64, 4)


def test_the_memory_lives_as_long_as_the_tensor():
    x = to_paddle(torch.full([1 << 20], 7.0))
    others = [torch.zeros(1 << 20) for _ in range(8)]
    assert (x == 7.0).all() and others


def test_nothing_is_lost_on_the_way():
    x, t = paddle.zeros([4, 5]), torch.zeros(4, 5)
    assert kept(lambda: to_torch(x)) < CALLS / 10
    assert kept(lambda: to_paddle(t)) < CALLS / 10


def test_a_loss_would_be_seen():
    """As it is in Paddle 3.3.1; when this fails, to_paddle may be simpler."""
    dense = paddle.base.core.from_dlpack(torch.utils.dlpack.to_dlpack(torch.zeros(4, 5)))
    assert kept(lambda: paddle.Tensor(dense)) >= CALLS
