"""Rotation of interleaved pairs in the last dimensions of a head; the first ones are copied. Spec section 6."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

TILE = 2048  # elements that a program works on at a time


@triton.jit
def _rotate(x, cos, sin, y, heads, D, P, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """HEADS heads of one token; pair p turns by its angle if it is one of the last P / 2."""
    t = tl.program_id(0).to(tl.int64)
    head, i, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    inside = (head < heads)[:, None] & (i < D)[None, :]
    at = (t * heads + head)[:, None] * D + i[None, :]
    v = tl.load(x + at, inside, 0.0)
    angle, turns = pair - (D - P) // 2, (pair >= (D - P) // 2) & (pair < D // 2)
    real = tl.load(cos + t * (P // 2) + angle, turns, 1.0).to(tl.float32)[None, :]
    imaginary = sign * tl.load(sin + t * (P // 2) + angle, turns, 0.0).to(tl.float32)[None, :]
    a, b = tl.split(tl.reshape(v.to(tl.float32), [HEADS, BLOCK // 2, 2]))
    turned = tl.reshape(tl.join(a * real - b * imaginary, b * real + a * imaginary), [HEADS, BLOCK])
    tl.store(y + at, tl.where(i[None, :] < D - P, v, turned.to(y.dtype.element_ty)), inside)


def rotate(carrier: Carrier, x: T, cos: T, sin: T, inverse: bool) -> T:
    """x [tokens, heads, D] contiguous, cos and sin [tokens, P / 2] -> a new tensor; backward is the inverse."""
    tokens, heads, width = x.shape
    y, block = carrier.empty(x.shape, carrier.dtype(x), x), triton.next_power_of_2(width)
    tile = min(triton.next_power_of_2(heads), max(1, TILE // block))
    carrier.launch(_rotate, (tokens, triton.cdiv(heads, tile)), x, cos, sin, y, heads, width, 2 * cos.shape[1],
                   -1.0 if inverse else 1.0, HEADS=tile, BLOCK=block, num_warps=4)
    return y
