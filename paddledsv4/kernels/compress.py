"""Compressor pooling: a softmax over the positions of a window weighs its features. Spec section 7.

Window g is made of W consecutive tokens: with overlap those of group g - 1, in their first half of the features, and
those of group g, in their second half; W = 2 ratio. Without it, those of group g; W = ratio. So every number of kv and
score belongs to one window, whose program also writes its gradient. Windows behind the last one give no entry: they
hold what is not pooled, and write zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.reduction import add_parts

FEATURES = 4, 4  # of a small window, that a thread works on at a time, forward and backward
LARGE = 4096  # elements of a large window that a program works on at a time
PROGRAMS = 4096, 2048  # at most about so many, forward and backward, where each adds a part to the sum for ape


@triton.jit
def _places(c, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr, W: tl.constexpr):
    """Of a window [W, BLOCK]: tokens after its group's first, features, entries of ape, and which of them exist."""
    k = tl.arange(0, W)
    token, column, width = k, c[None, :], D
    if OVERLAP:
        token, column, width = k - RATIO, tl.where(k < RATIO, 0, D)[:, None] + column, 2 * D
    exists = (k < RATIO * (1 + OVERLAP))[:, None] & (c < D)[None, :]
    return token, column, (k % RATIO)[:, None] * width + column, exists


@triton.jit
def _window(kv, score, shift, g, batch, c, groups, tokens, batches, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
            W: tl.constexpr):
    """Features and weights [W, BLOCK] of window g, where they lie, and which of them exist. ``shift``: its ape."""
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    token += g * RATIO
    real = exists & ((token >= 0) & (token < tokens))[:, None]
    at = (token.to(tl.int64) * batches + batch)[:, None] * ((1 + OVERLAP) * D) + column
    pooled = real & (g < groups)
    logit, v = tl.load(score + at, pooled, 0.0), tl.load(kv + at, pooled, 0.0)
    logit = tl.where(pooled, logit.to(tl.float32) + shift, float("-inf"))
    top = tl.max(logit, 0)
    weight = tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(weight, 0)
    weight *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
    return v.to(tl.float32), weight, at, real


@triton.jit
def _forward(kv, score, ape, out, groups, tokens, batches, D, each, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
             W: tl.constexpr, BLOCK: tl.constexpr):
    first, batch = tl.program_id(0) * each, tl.program_id(2)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    shift = tl.load(ape + position, exists, 0.0).to(tl.float32)
    for k in range(each):
        g = first + k
        v, weight, at, real = _window(kv, score, shift, g, batch, c, groups, tokens, batches, D, RATIO, OVERLAP, W)
        to = (g.to(tl.int64) * batches + batch) * D + c
        tl.store(out + to, tl.sum(v * weight, 0).to(out.dtype.element_ty), (c < D) & (g < groups))


@triton.jit
def _backward(dout, kv, score, ape, dkv, dscore, parts, groups, tokens, batches, D, each, RATIO: tl.constexpr,
              OVERLAP: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """``each`` windows of one batch entry, and their part of dape."""
    first, batch = tl.program_id(0) * each, tl.program_id(2)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    shift = tl.load(ape + position, exists, 0.0).to(tl.float32)
    part = tl.zeros([W, BLOCK], tl.float32)
    for k in range(each):
        g = first + k
        dy = tl.load(dout + (g.to(tl.int64) * batches + batch) * D + c, (c < D) & (g < groups), 0.0).to(tl.float32)
        v, weight, at, real = _window(kv, score, shift, g, batch, c, groups, tokens, batches, D, RATIO, OVERLAP, W)
        dv = dy[None, :] * weight
        ds = dv * (v - tl.sum(v * weight, 0)[None, :])
        part += ds
        tl.store(dkv + at, dv.to(dkv.dtype.element_ty), real)
        tl.store(dscore + at, ds.to(dscore.dtype.element_ty), real)
    to = (tl.program_id(0) * batches + batch).to(tl.int64) * (RATIO * (1 + OVERLAP) * D)
    tl.store(parts + to + position, part, exists)


def _tile(ratio: int, overlap: bool, width: int, features: int) -> dict[str, int]:
    """A small window is held by a thread, for a few features, so that nothing is exchanged; a large one by 4 warps."""
    window = triton.next_power_of_2(2 * ratio if overlap else ratio)
    block = min(triton.next_power_of_2(width), 32 * features if window <= 16 else max(32, LARGE // window))
    return {"RATIO": ratio, "OVERLAP": overlap, "W": window, "BLOCK": block, "num_warps": 1 if window <= 16 else 4}


def forward(carrier: Carrier, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> T:
    """kv and score [s, b, c*d] contiguous, ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    tile = _tile(ratio, overlap, width, FEATURES[0])
    blocks, out = triton.cdiv(width, tile["BLOCK"]), carrier.empty([groups, batches, width], carrier.dtype(kv), kv)
    each = triton.cdiv(groups * blocks * batches, PROGRAMS[0])
    carrier.launch(_forward, (triton.cdiv(groups, max(1, each)), blocks, batches), kv, score, ape, out, groups, tokens,
                   batches, width, each, **tile)
    return out


def backward(carrier: Carrier, dout: T, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> tuple[T, T, T]:
    """dout [s // ratio, b, d] -> dkv and dscore [s, b, c*d], zero where nothing is pooled, dape [ratio, c*d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    tile = _tile(ratio, overlap, width, FEATURES[1])
    dkv, dscore = carrier.empty(kv.shape, carrier.dtype(kv), kv), carrier.empty(kv.shape, carrier.dtype(score), kv)
    windows, blocks = triton.cdiv(tokens, ratio) + overlap, triton.cdiv(width, tile["BLOCK"])
    each = triton.cdiv(windows * blocks * batches, PROGRAMS[1])
    count = triton.cdiv(windows, each)
    parts = carrier.empty([count * batches, ratio, wide], "float32", kv)
    carrier.launch(_backward, (count, blocks, batches), dout, kv, score, ape, dkv, dscore, parts, groups, tokens,
                   batches, width, each, **tile)
    return dkv, dscore, add_parts(carrier, parts, ape.shape, carrier.dtype(ape))
