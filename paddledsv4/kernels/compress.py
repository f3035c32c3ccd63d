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

# FEATURES: side by side in a thread. PROGRAMS: about so many, each of which adds a part to the sum for ape. REGISTERS:
# at most so many, so that all programs run at once.
FORWARD = {"FEATURES": 8, "WARPS": 1}
BACKWARD = {"FEATURES": 2, "WARPS": 4, "PROGRAMS": 528, "REGISTERS": 128}
LARGE_FORWARD = {"BLOCK": 32, "FEATURES": 8, "WARPS": 2}
LARGE_BACKWARD = {"BLOCK": 32, "FEATURES": 4, "WARPS": 4, "PROGRAMS": 256}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(ape, D, batches, G: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, W: tl.constexpr,
            BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """Of every window of a program: its features c [1, 1, BLOCK], of which a thread is to have FEATURES side by side;
    [1, W, BLOCK]: tokens and numbers after its group's first, entries of ape, which of them exist; ape log2(e)."""
    c = tl.max_contiguous(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), FEATURES)[None, None, :]
    k = tl.arange(0, W)[None, :, None]
    token, column, width = k, c, D
    if OVERLAP:
        token, column, width = k - RATIO, tl.where(k < RATIO, 0, D) + c, 2 * D
    position, exists = (k % RATIO) * width + column, (k < RATIO * (1 + OVERLAP)) & (c < D)
    shift = tl.load(ape + position + tl.zeros([G, 1, 1], tl.int32), exists, 0.0).to(tl.float32) * LOG2E
    return c, token, token * batches * width + column, position, exists, shift


@triton.jit
def _lie(g, token, inner, exists, groups, tokens, batches, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """Of windows g [G, 1, 1]: where their numbers lie, which of them exist, and which of these are pooled."""
    token += g * RATIO
    real = exists & (token >= 0) & (token < tokens)
    at = (g.to(tl.int64) * (RATIO * batches) + tl.program_id(2)) * ((1 + OVERLAP) * D) + inner
    return at, real, real & (g < groups)


@triton.jit
def _pool(score, kv, shift, pooled):
    """Features and exponentials [G, W, BLOCK], one over the sum of these, and the pooled features."""
    logit, v = tl.where(pooled, score.to(tl.float32) * LOG2E + shift, float("-inf")), kv.to(tl.float32)
    top = tl.max(logit, 1, keep_dims=True)
    weight = tl.exp2(logit - tl.where(top == float("-inf"), 0.0, top))
    total, mean = tl.sum(weight, 1, keep_dims=True), tl.sum(weight * v, 1, keep_dims=True)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return v, weight, inverse, mean * inverse


@triton.jit
def _forward(kv, score, ape, out, groups, tokens, batches, D, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
             W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    c, token, inner, position, exists, shift = _places(ape, D, batches, G, RATIO, OVERLAP, W, BLOCK, FEATURES)
    g = tl.program_id(0) * G + tl.arange(0, G)[:, None, None]
    at, real, pooled = _lie(g, token, inner, exists, groups, tokens, batches, D, RATIO, OVERLAP)
    mean = _pool(tl.load(score + at, pooled, 0.0), tl.load(kv + at, pooled, 0.0), shift, pooled)[3]
    to = (g.to(tl.int64) * batches + tl.program_id(2)) * D + c
    tl.store(out + to, mean.to(out.dtype.element_ty), (c < D) & (g < groups))


@triton.jit
def _load(dout, kv, score, g, c, token, inner, exists, last, tokens, batches, D, RATIO: tl.constexpr,
          OVERLAP: tl.constexpr):
    """Gradients of the entries, scores and features of windows g."""
    at, _, pooled = _lie(g, token, inner, exists, last, tokens, batches, D, RATIO, OVERLAP)
    dy = tl.load(dout + (g.to(tl.int64) * batches + tl.program_id(2)) * D + c, (c < D) & (g < last), 0.0)
    return dy, tl.load(score + at, pooled, 0.0), tl.load(kv + at, pooled, 0.0)


@triton.jit
def _backward(dout, kv, score, ape, dkv, dscore, parts, groups, tokens, batches, D, each, RATIO: tl.constexpr,
              OVERLAP: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """``each`` windows of one batch entry, and their part of dape. Windows are loaded into registers while those before
    them are computed: with shared memory in between the warps would wait for each other."""
    c, token, inner, position, exists, shift = _places(ape, D, batches, G, RATIO, OVERLAP, W, BLOCK, FEATURES)
    part = tl.zeros([G, W, BLOCK], tl.float32)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, groups)
    g = first + tl.arange(0, G)[:, None, None]
    dy, s, u = _load(dout, kv, score, g, c, token, inner, exists, last, tokens, batches, D, RATIO, OVERLAP)
    for _ in range(0, each, G):
        at, real, pooled = _lie(g, token, inner, exists, last, tokens, batches, D, RATIO, OVERLAP)
        g += G
        following = _load(dout, kv, score, g, c, token, inner, exists, last, tokens, batches, D, RATIO, OVERLAP)
        v, weight, inverse, mean = _pool(s, u, shift, pooled)
        dv = weight * (dy.to(tl.float32) * inverse)
        ds = dv * (v - mean)
        part += ds
        tl.store(dkv + at, dv.to(dkv.dtype.element_ty), real)
        tl.store(dscore + at, ds.to(dscore.dtype.element_ty), real)
        dy, s, u = following
    to = (tl.program_id(0) * batches + tl.program_id(2)).to(tl.int64) * (RATIO * (1 + OVERLAP) * D)
    tl.store(parts + to + position, tl.sum(part, 0, keep_dims=True), exists)


def _plan(ratio: int, overlap: bool, width: int, small: dict, large: dict) -> tuple[dict, int]:
    """Tile, and programs wanted: of a small window a thread has all positions, a warp one at a time."""
    window = triton.next_power_of_2(2 * ratio if overlap else ratio)
    plan = small if window <= 16 else large
    block = min(triton.next_power_of_2(width), plan.get("BLOCK", 32 * plan["FEATURES"]))
    tile = {"RATIO": ratio, "OVERLAP": overlap, "W": window, "G": plan["WARPS"] if window <= 16 else 1, "BLOCK": block,
            "FEATURES": plan["FEATURES"], "num_warps": plan["WARPS"], "maxnreg": plan.get("REGISTERS")}
    return tile, plan.get("PROGRAMS", 0)


def forward(carrier: Carrier, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> T:
    """kv and score [s, b, c*d] contiguous, ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    out = carrier.empty([groups, batches, width], carrier.dtype(kv), kv)
    tile, _ = _plan(ratio, overlap, width, FORWARD, LARGE_FORWARD)
    grid = triton.cdiv(groups, tile["G"]), triton.cdiv(width, tile["BLOCK"]), batches
    carrier.launch(_forward, grid, kv, score, ape, out, groups, tokens, batches, width, **tile)
    return out


def backward(carrier: Carrier, dout: T, kv: T, score: T, ape: T, ratio: int, overlap: bool) -> tuple[T, T, T]:
    """dout [s // ratio, b, d] -> dkv and dscore [s, b, c*d], zero where nothing is pooled, dape [ratio, c*d]."""
    tokens, batches, wide = kv.shape
    groups, width = tokens // ratio, wide // (1 + overlap)
    dkv, dscore = carrier.empty(kv.shape, carrier.dtype(kv), kv), carrier.empty(kv.shape, carrier.dtype(score), kv)
    windows = triton.cdiv(tokens, ratio) + overlap
    tile, programs = _plan(ratio, overlap, width, BACKWARD, LARGE_BACKWARD)
    blocks = triton.cdiv(width, tile["BLOCK"])
    each = triton.cdiv(windows, max(1, programs // (blocks * batches)))
    each = triton.cdiv(each, tile["G"]) * tile["G"]
    grid = triton.cdiv(windows, each), blocks, batches
    parts = carrier.empty([grid[0] * batches, ratio, wide], "float32", kv)
    carrier.launch(_backward, grid, dout, kv, score, ape, dkv, dscore, parts, groups, tokens, batches, width, each,
                   **tile)
    return dkv, dscore, add_parts(carrier, parts, ape.shape, carrier.dtype(ape))
