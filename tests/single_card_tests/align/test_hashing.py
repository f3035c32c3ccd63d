"""MD5s of tensors are those of their bytes in C order, whatever the memory looks like."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from align.hashing import tensor_md5
from align.losslog import loss_md5

TENSOR = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        TENSOR, TENSOR.T, TENSOR[:, ::2], TENSOR[::-1], TENSOR.astype(">f4"), TENSOR.astype(np.int64), TENSOR > 3,
        TENSOR[0, 0, 0], TENSOR[:0], TENSOR.astype(np.uint16),
    ],
)  # fmt: skip
def test_the_bytes_in_order(tensor):
    little = tensor.astype(tensor.dtype.newbyteorder("<"))
    assert tensor_md5(tensor) == hashlib.md5(little.tobytes()).hexdigest()


def test_bits_count_not_values():
    assert tensor_md5(np.float32([0.0])) != tensor_md5(np.float32([-0.0]))
    assert loss_md5(1.5) == tensor_md5(np.float32(1.5))


def test_objects_have_no_bytes():
    with pytest.raises(TypeError, match="no bytes"):
        tensor_md5(np.array([None]))


def test_nothing_is_copied():
    tensor = np.zeros(1 << 20, np.float32)
    tracemalloc.start()
    tensor_md5(tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
