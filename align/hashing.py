"""MD5s of tensors, over the memory that they already lie in."""

from __future__ import annotations

import hashlib

import numpy as np


def tensor_md5(tensor: np.ndarray) -> str:
    """MD5 of the tensor's bytes in C order, little-endian, as 32 hex digits.

    A tensor in that order already, which nearly every one is, is not copied, and other threads run meanwhile.

    Args:
        tensor: of any dtype but object; bf16 comes as its 16 bits (uint16), for numpy has no such dtype.

    Raises:
        TypeError: the dtype holds Python objects.
    """
    tensor = np.asarray(tensor)
    if tensor.dtype.hasobject:
        raise TypeError(f"dtype {tensor.dtype} has no bytes of its own")
    little = tensor.dtype.newbyteorder("<")
    packed = np.ascontiguousarray(tensor, dtype=little)  # the tensor itself, unless it must be rearranged
    return hashlib.md5(packed.reshape(-1).view(np.uint8), usedforsecurity=False).hexdigest()
