"""Sums over many programs without atomics: every program writes its part, a second kernel adds the parts."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

ROWS = 64  # parts that are loaded at a time


@triton.jit
def _add_parts(parts, total, count, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total = the sum of the rows of parts, always in the same order: the same bits in every run."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, ROWS)
    value = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = (first + r).to(tl.int64)[:, None]
        value += tl.load(parts + row * size + i[None, :], (row < count) & (i < size)[None, :], 0.0)
    tl.store(total + i, tl.sum(value, 0).to(total.dtype.element_ty), i < size)


def add_parts(carrier: Carrier, parts: T, shape: list[int], dtype: str) -> T:
    """parts [count, ...] in float32 -> their sum, of ``shape`` and ``dtype``."""
    count, size = parts.shape[0], math.prod(shape)
    total = carrier.empty(shape, dtype, parts)
    rows = min(ROWS, triton.next_power_of_2(count))
    block = 4096 // rows if size > 4096 * 64 else max(32, 1024 // rows)
    carrier.launch(_add_parts, (triton.cdiv(size, block),), parts, total, count, size,
                   ROWS=rows, BLOCK=block, num_warps=4)
    return total
