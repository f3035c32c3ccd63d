"""RMS normalisation of rows: y = x r, or x r w with a weight, r = 1 / sqrt(mean(x^2) + eps). Spec section 0."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.reduction import add_parts

TILE = 4096  # elements that a program works on at a time
PROGRAMS, STAGES = 256, 3  # of the backward with a weight; every program adds a part to the sum for the weight


@triton.jit
def _forward(x, w, y, rows, L, eps, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (i < L)[None, :]
    at = row[:, None] * L + i[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if WEIGHT:  # loaded before the sum, whose barrier it would wait for
        weight = tl.load(w + i, i < L, 0.0).to(tl.float32)[None, :]
    v *= tl.rsqrt(tl.sum(v * v, 1) / L + eps)[:, None]
    if WEIGHT:
        v *= weight
    tl.store(y + at, v.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(dy, x, w, dx, parts, rows, L, eps, each,
              WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """``each`` rows of dx, ROWS at a time, and their part of dw."""
    i = tl.arange(0, BLOCK)
    if WEIGHT:
        weight = tl.load(w + i, i < L, 0.0).to(tl.float32)[None, :]
    part = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * each
    for k in tl.range(0, each, ROWS, num_stages=STAGES):
        row = first + k + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (i < L)[None, :]
        at = row[:, None] * L + i[None, :]
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(dy + at, inside, 0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v, 1) / L + eps)[:, None]
        v *= r
        if WEIGHT:
            part += g * v
            g *= weight
        tl.store(dx + at, ((g - v * (tl.sum(g * v, 1) / L)[:, None]) * r).to(dx.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(parts + tl.program_id(0) * L + i, tl.sum(part, 0), i < L)


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, TILE // block), "num_warps": 8 if block <= 8192 else 16}


def forward(carrier: Carrier, x: T, weight: T | None, eps: float) -> T:
    """x [rows, L] contiguous, weight [L] or None -> y [rows, L] in the dtype of x."""
    rows, width = x.shape
    y, tile = carrier.empty(x.shape, carrier.dtype(x), x), _tile(width)
    carrier.launch(_forward, (triton.cdiv(rows, tile["ROWS"]),), x, x if weight is None else weight, y, rows, width,
                   eps, WEIGHT=weight is not None, **tile)
    return y


def backward(carrier: Carrier, dy: T, x: T, weight: T | None, eps: float) -> tuple[T, T | None]:
    """dy, x [rows, L] contiguous -> dx in the dtype of x, dw in that of weight; r is computed anew."""
    rows, width = x.shape
    dx, tile = carrier.empty(x.shape, carrier.dtype(x), x), _tile(width)
    if weight is None:
        carrier.launch(_backward, (triton.cdiv(rows, tile["ROWS"]),), dy, x, x, dx, dx, rows, width, eps,
                       tile["ROWS"], WEIGHT=False, STAGES=1, **tile)
        return dx, None
    each = tile["ROWS"] * max(1, triton.cdiv(rows, PROGRAMS * tile["ROWS"]))
    count = triton.cdiv(rows, each)
    parts = carrier.empty([count, width], "float32", x)
    carrier.launch(_backward, (count,), dy, x, weight, dx, parts, rows, width, eps, each,
                   WEIGHT=True, STAGES=STAGES, **tile)
    return dx, add_parts(carrier, parts, [width], carrier.dtype(weight))
