"""Triton's interpreter under numpy 2.4: kernels run on a CPU, for tests."""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def mend() -> None:
    """Mends three things of Triton 3.6's interpreter.

    * A kernel may loop to a number that it was given: it is held as an array of one element, of which numpy 2.4 makes
      no integer.
    * float32 is rounded to bfloat16 as the GPU does, to nearest even: the interpreter cuts off.
    * A product of bfloat16 matrices is that of their values: the interpreter multiplies their bits as integers.
    """
    patch, convert, dot = (
        interpreter._patch_lang_tensor, interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    )

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def converted(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return _narrow(values.view(np.uint32))
        if (source, target) == (tl.bfloat16, tl.float32):
            return _wide(values)
        return convert(values, source, target, rounding)

    def product(self, a, b, d, *options):
        return dot(self, _as_float32(a), _as_float32(b), d, *options)

    interpreter._patch_lang_tensor = patched
    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = product


def _narrow(bits: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers -> those of the nearest bfloat16 ones; NaN stays NaN."""
    upper = (bits >> 16).astype(np.uint16)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(bits << 1 > 0xFF000000, upper | 0x40, rounded)


def _wide(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 numbers -> those of the same float32 ones."""
    return bits.astype(np.uint32) << 16


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(_wide(handle.data).view(np.float32), tl.float32)
