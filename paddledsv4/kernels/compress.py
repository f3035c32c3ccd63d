"""Compressor pooling: a softmax over the positions of a window weighs its features. Spec section 7.

Window g is made of W consecutive tokens: with overlap those of group g - 1, in their first half of the features, and
those of group g, in their second half; W = 2 ratio. Without it, those of group g; W = ratio. So every number of kv and
score belongs to one window, whose program also writes its gradient. Windows behind the last one give no entry: they
hold what is not pooled, and write zeros.

A tile is [G, W, BLOCK]: G windows at once. Small windows lie within a thread, so that nothing is exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.reduction import add_parts

# FEATURES: side by side in a thread. PROGRAMS: about so many; in backward each adds a part to the sum for ape.
FORWARD = {"FEATURES": 8, "WARPS": 1, "STAGES": 1, "PROGRAMS": 16384}
BACKWARD = {"FEATURES": 4, "WARPS": 4, "STAGES": 2, "PROGRAMS": 396}
LARGE_FORWARD = {"BLOCK": 32, "WARPS": 2, "STAGES": 1, "PROGRAMS": 2048}
LARGE_BACKWARD = {"BLOCK": 32, "WARPS": 4, "STAGES": 2, "PROGRAMS": 256}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(c, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr, W: tl.constexpr):
    """Of a window [1, W, BLOCK]: tokens after its group's first, features, entries of ape, and which of them exist."""
    k = tl.arange(0, W)[None, :, None]
    token, column, width = k, c, D
    if OVERLAP:
        token, column, width = k - RATIO, tl.where(k < RATIO, 0, D) + c, 2 * D
    return token, column, (k % RATIO) * width + column, (k < RATIO * (1 + OVERLAP)) & (c < D)


@triton.jit
def _windows(kv, score, shift, g, batch, c, groups, tokens, batches, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
             W: tl.constexpr):
    """Windows g [G, 1, 1]: features and exponentials [G, W, BLOCK], one over the sum of these, the pooled features,
    where they lie, and which of them exist. ``shift``: ape log2(e)."""
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    token += g * RATIO
    real = exists & (token >= 0) & (token < tokens)
    at = (token.to(tl.int64) * batches + batch) * ((1 + OVERLAP) * D) + column
    pooled = real & (g < groups)
    logit, v = tl.load(score + at, pooled, 0.0), tl.load(kv + at, pooled, 0.0).to(tl.float32)
    logit = tl.where(pooled, logit.to(tl.float32) * LOG2E + shift, float("-inf"))
    top = tl.max(logit, 1, keep_dims=True)
    weight = tl.exp2(logit - tl.where(top == float("-inf"), 0.0, top))
    total, mean = tl.sum(weight, 1, keep_dims=True), tl.sum(weight * v, 1, keep_dims=True)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return v, weight, inverse, mean * inverse, at, real


@triton.jit
def _features(D, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """A program's features [1, 1, BLOCK], of which a thread is to have FEATURES side by side."""
    return tl.max_contiguous(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), FEATURES)[None, None, :]


@triton.jit
def _forward(kv, score, ape, out, groups, tokens, batches, D, each, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
             W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr):
    first, batch, c = tl.program_id(0) * each, tl.program_id(2), _features(D, BLOCK, FEATURES)
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    shift = tl.load(ape + position + tl.zeros([G, 1, 1], tl.int32), exists, 0.0).to(tl.float32) * LOG2E
    for k in tl.range(0, each, G, num_stages=STAGES):
        g = first + k + tl.arange(0, G)[:, None, None]
        v, weight, inverse, mean, at, real = _windows(kv, score, shift, g, batch, c, groups, tokens, batches, D,
                                                      RATIO, OVERLAP, W)
        to = (g.to(tl.int64) * batches + batch) * D + c
        tl.store(out + to, mean.to(out.dtype.element_ty), (c < D) & (g < groups))


@triton.jit
def _backward(dout, kv, score, ape, dkv, dscore, parts, groups, tokens, batches, D, each, RATIO: tl.constexpr,
              OVERLAP: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
              STAGES: tl.constexpr):
    """``each`` windows of one batch entry, and their part of dape."""
    first, batch, c = tl.program_id(0) * each, tl.program_id(2), _features(D, BLOCK, FEATURES)
    token, column, position, exists = _places(c, D, RATIO, OVERLAP, W)
    shift = tl.load(ape + position + tl.zeros([G, 1, 1], tl.int32), exists, 0.0).to(tl.float32) * LOG2E
    part = tl.zeros([G, W, BLOCK], tl.float32)
    for k in tl.range(0, each, G, num_stages=STAGES):
        g = first + k + tl.arange(0, G)[:, None, None]
        dy = tl.load(dout + (g.to(tl.int64) * batches + batch) * D + c, (c < D) & (g < groups), 0.0).to(tl.float32)
        v, weight, inverse, mean, at, real = _windows(kv, score, shift, g, batch, c, groups, tokens, batches, D,
                                                      RATIO, OVERLAP, W)
        dv = weight * (dy * inverse)
        ds = dv * (v - mean)
        part += ds
        tl.store(dkv + at, dv.to(dkv.dtype.element_ty), real)
        tl.store(dscore + at, ds.to(dscore.dtype.element_ty), real)
    to = (tl.program_id(0) * batches + batch).to(tl.int64) * (RATIO * (1 + OVERLAP) * D)
    tl.store(parts + to + position, tl.sum(part, 0, keep_dims=True), exists)


def _plan(ratio: int, overlap: bool, width: int, windows: int, batches: int, small: dict, large: dict):
    """Grid, windows of a program, and tile: of a small window a thread has all positions, a warp one at a time."""
    window = triton.next_power_of_2(2 * ratio if overlap else ratio)
    plan, features = (small, small["FEATURES"]) if window <= 16 else (large, 8)
    block = min(triton.next_power_of_2(width), plan.get("BLOCK", 32 * features))
    at_once, blocks = plan["WARPS"] if window <= 16 else 1, triton.cdiv(width, block)
    programs = max(1, plan["PROGRAMS"] // (blocks * batches))
    each = at_once * max(1, triton.cdiv(windows, programs * at_once))
    tile = {"RATIO": ratio, "OVERLAP": overlap, "W": window, "G": at_once, "BLOCK": block, "FEATURES": features,
            "STAGES": plan["STAGES"], "num_warps": plan["WARPS"]}
    return (triton.cdiv(windows, each), blocks, batches), each, tile


def forward(carrier: Carrier, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> T:
    """kv and score [s, b, c*d] contiguous, ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    out = carrier.empty([groups, batches, width], carrier.dtype(kv), kv)
    grid, each, tile = _plan(ratio, overlap, width, groups, batches, FORWARD, LARGE_FORWARD)
    carrier.launch(_forward, grid, kv, score, ape, out, groups, tokens, batches, width, each, **tile)
    return out


def backward(carrier: Carrier, dout: T, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> tuple[T, T, T]:
    """dout [s // ratio, b, d] -> dkv and dscore [s, b, c*d], zero where nothing is pooled, dape [ratio, c*d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    dkv, dscore = carrier.empty(kv.shape, carrier.dtype(kv), kv), carrier.empty(kv.shape, carrier.dtype(score), kv)
    windows = triton.cdiv(tokens, ratio) + overlap
    grid, each, tile = _plan(ratio, overlap, width, windows, batches, BACKWARD, LARGE_BACKWARD)
    parts = carrier.empty([grid[0] * batches, ratio, wide], "float32", kv)
    carrier.launch(_backward, grid, dout, kv, score, ape, dkv, dscore, parts, groups, tokens, batches, width, each,
                   **tile)
    return dkv, dscore, add_parts(carrier, parts, ape.shape, carrier.dtype(ape))
