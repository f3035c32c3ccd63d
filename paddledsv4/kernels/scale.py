"""A tensor times one number that is on the device, rounded once and without a wider copy of the tensor."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T


@triton.jit
def _times(x, factor, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < size, 0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, value.to(out.dtype.element_ty), i < size)


def times(carrier: Carrier, x: T, factor: T) -> T:
    """Contiguous x of any shape, factor one float32 number -> x factor, of the shape and dtype of x."""
    size, out = math.prod(x.shape), carrier.empty(x.shape, carrier.dtype(x), x)
    carrier.launch(_times, (triton.cdiv(size, 4096),), x, factor, out, size, BLOCK=4096, num_warps=4)
    return out
