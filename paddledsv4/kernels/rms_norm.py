"""RMS normalisation of rows, with a weight: y = x r w, r = 1 / sqrt(mean(x^2) + eps). Spec section 0."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T


@triton.jit
def _forward(x, w, y, r, stride, L, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < L
    v = tl.load(x + row * stride + i, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 0) / L + eps)
    weight = tl.load(w + i, inside, 0.0).to(tl.float32)
    tl.store(y + row * L + i, (v * scale * weight).to(y.dtype.element_ty), inside)
    tl.store(r + row, scale)


def forward(carrier: Carrier, x: T, weight: T, eps: float) -> tuple[T, T]:
    """x [rows, L] with unit stride inside a row, weight [L] -> y [rows, L] in the dtype of x, r [rows] float32."""
    rows, width = x.shape
    y, r = carrier.empty(x.shape, carrier.dtype(x), x), carrier.empty([rows], "float32", x)
    carrier.launch(_forward, (rows,), x, weight, y, r, carrier.strides(x)[0], width, eps,
                   BLOCK=triton.next_power_of_2(width), num_warps=8)
    return y, r


@triton.jit
def _backward(dy, x, w, r, dx, dw, rows, L, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows of dx, and their part of dw."""
    i = tl.arange(0, BLOCK)
    inside = i < L
    weight = tl.load(w + i, inside, 0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for k in range(ROWS):
        row = first + k
        here = inside & (row < rows)
        scale = tl.load(r + row, row < rows, 0.0)
        u = tl.load(x + row * L + i, here, 0.0).to(tl.float32) * scale
        g = tl.load(dy + row * L + i, here, 0.0).to(tl.float32)
        part += g * u
        g = g * weight
        tl.store(dx + row * L + i, ((g - u * (tl.sum(g * u, 0) / L)) * scale).to(dx.dtype.element_ty), here)
    tl.store(dw + tl.program_id(0) * L + i, part, inside)


@triton.jit
def _add_parts(parts, total, count, L, BLOCK: tl.constexpr):
    """total = the sum of the rows of parts, one after another: the same bits in every run."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < L
    value = tl.zeros([BLOCK], tl.float32)
    for row in range(count):
        value += tl.load(parts + row * L + i, inside, 0.0)
    tl.store(total + i, value.to(total.dtype.element_ty), inside)


def backward(carrier: Carrier, dy: T, x: T, weight: T, r: T) -> tuple[T, T]:
    """dy, x [rows, L] contiguous, r from ``forward`` -> dx in the dtype of x, dw in that of weight."""
    rows, width = x.shape
    each = max(16, triton.cdiv(rows, 1024))
    count = triton.cdiv(rows, each)
    dx, parts = carrier.empty(x.shape, carrier.dtype(x), x), carrier.empty([count, width], "float32", x)
    dw = carrier.empty([width], carrier.dtype(weight), weight)
    carrier.launch(_backward, (count,), dy, x, weight, r, dx, parts, rows, width,
                   ROWS=each, BLOCK=triton.next_power_of_2(width), num_warps=8)
    carrier.launch(_add_parts, (triton.cdiv(width, 128),), parts, dw, count, width, BLOCK=128, num_warps=1)
    return dx, dw
