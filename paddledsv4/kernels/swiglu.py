"""Clamped SwiGLU of rows: h = silu(min(gate, c)) clip(linear, -c, c), times the row's probability. Spec section 9.5."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T


@triton.jit
def _halves(x, row, i, F, limit):
    """The two halves of a row in float32, clamped, and where the clamps let gradients through; NaN stays NaN."""
    gate = tl.load(x + row * (2 * F) + i, i < F, 0.0).to(tl.float32)
    up = tl.load(x + row * (2 * F) + F + i, i < F, 0.0).to(tl.float32)
    below, within = gate <= limit, (up <= limit) & (up >= -limit)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up, below, within


@triton.jit
def _forward(x, prob, y, F, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, _, _ = _halves(x, row, i, F, limit)
    h = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        h *= tl.load(prob + row).to(tl.float32)
    tl.store(y + row * F + i, h.to(y.dtype.element_ty), i < F)


@triton.jit
def _backward(dy, x, prob, dx, dprob, F, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p, dp = 1.0, 0.0
    if WEIGHTED:
        p = tl.load(prob + row).to(tl.float32)
    for first in range(0, F, BLOCK):
        i = first + tl.arange(0, BLOCK)
        gate, up, below, within = _halves(x, row, i, F, limit)
        g = tl.load(dy + row * F + i, i < F, 0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
        silu = gate * sigma
        if WEIGHTED:
            dp += tl.sum(g * silu * up, 0)
            g *= p
        dgate = tl.where(below, g * up * (sigma + silu * (1.0 - sigma)), 0.0)
        dup = tl.where(within, g * silu, 0.0)
        tl.store(dx + row * (2 * F) + i, dgate.to(dx.dtype.element_ty), i < F)
        tl.store(dx + row * (2 * F) + F + i, dup.to(dx.dtype.element_ty), i < F)
    if WEIGHTED:
        tl.store(dprob + row, dp.to(dprob.dtype.element_ty))


def _block(features: int, most: int) -> int:
    return min(most, triton.next_power_of_2(features))


def forward(carrier: Carrier, x: T, prob: T | None, limit: float) -> T:
    """x [rows, 2F] contiguous (gate, then linear), prob [rows] or None -> [rows, F] in the dtype of x."""
    rows, features = x.shape[0], x.shape[1] // 2
    y, block = carrier.empty([rows, features], carrier.dtype(x), x), _block(features, 2048)
    carrier.launch(_forward, (rows, triton.cdiv(features, block)), x, x if prob is None else prob, y, features,
                   float(limit), WEIGHTED=prob is not None, BLOCK=block, num_warps=4)
    return y


def backward(carrier: Carrier, dy: T, x: T, prob: T | None, limit: float) -> tuple[T, T | None]:
    """dy [rows, F], x and prob as given to ``forward`` -> dx [rows, 2F], dprob [rows] in the dtype of prob."""
    rows, features = dy.shape
    dx = carrier.empty(x.shape, carrier.dtype(x), x)
    dprob = None if prob is None else carrier.empty([rows], carrier.dtype(prob), prob)
    carrier.launch(_backward, (rows,), dy, x, x if prob is None else prob, dx, dx if dprob is None else dprob,
                   features, float(limit), WEIGHTED=prob is not None, BLOCK=_block(features, 1024), num_warps=4)
    return dx, dprob
