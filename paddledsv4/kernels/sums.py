"""Sums in a fixed order, and the change of dtype that ends them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

ROWS = 128


@triton.jit
def _column_sums(x, total, rows, L, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A row of ``total`` from ROWS rows of x."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.load(x + r[:, None].to(tl.int64) * L + i[None, :], (r[:, None] < rows) & (i[None, :] < L), 0.0)
    tl.store(total + tl.program_id(0) * L + i, tl.sum(v, 0).to(total.dtype.element_ty), i < L)


def column_sums(carrier: Carrier, x: T, rows: int, shape: Sequence[int], dtype: str) -> T:
    """x of ``rows`` contiguous float32 tensors of ``shape`` -> their sum in ``dtype``: of ROWS rows at a time, then of
    these sums."""
    width = math.prod(shape)
    while True:
        left = triton.cdiv(rows, ROWS)
        total = carrier.empty(shape if left == 1 else [left, width], dtype if left == 1 else "float32", x)
        carrier.launch(_column_sums, (left, triton.cdiv(width, 32)), x, total, rows, width, ROWS=ROWS, BLOCK=32,
                       num_warps=4)
        if left == 1:
            return total
        x, rows = total, left


@triton.jit
def _cast(x, y, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < count).to(y.dtype.element_ty), i < count)


def cast(carrier: Carrier, x: T, dtype: str) -> T:
    """Contiguous x in ``dtype``; x itself if it is that."""
    if carrier.dtype(x) == dtype:
        return x
    count = math.prod(x.shape)
    y = carrier.empty(x.shape, dtype, x)
    carrier.launch(_cast, (triton.cdiv(count, 4096),), x, y, count, BLOCK=4096, num_warps=8)
    return y
