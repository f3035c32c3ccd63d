"""Scores of the lightning indexer: sum over heads of weight times ReLU(q k), reduced in registers.

A program has a tile of entries and walks through queries: the products [entries, heads] of one query at a time are
all that exists of [s, g, heads].
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.sums import column_sums


@triton.jit
def _keys(key, entry, batch, b, g, D, BLOCK_D: tl.constexpr):
    """[entries, BLOCK_D], zeros where there is none."""
    d = tl.arange(0, BLOCK_D)
    inside = (entry[:, None] < g) & (d[None, :] < D)
    return tl.load(key + (entry[:, None].to(tl.int64) * b + batch) * D + d[None, :], inside, 0.0)


@triton.jit
def _heads(query, weights, row, batch, s, b, H, D, scale, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """The heads [BLOCK_H, BLOCK_D] of a query, and their weights [BLOCK_H]."""
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    token = batch.to(tl.int64) + row * b
    here = (head < H) & (row < s)
    q = tl.load(query + (token * H + head[:, None]) * D + d[None, :], here[:, None] & (d[None, :] < D), 0.0)
    return q, tl.load(weights + token * H + head, here, 0.0).to(tl.float32) * scale


@triton.jit
def _forward(query, key, weights, scores, s, b, g, H, D, scale, ratio, offset, BLOCK_H: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
             PRECISION: tl.constexpr):
    """ROWS queries against BLOCK_G entries. CAUSAL: what is not complete for any of the queries is left as it is."""
    batch = tl.program_id(2)
    entry = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, s)
    if CAUSAL:
        first = tl.maximum(first, (tl.program_id(0) * BLOCK_G + 1) * ratio - 1 - offset)
    keys = _keys(key, entry, batch, b, g, D, BLOCK_D)
    for row in range(first, last):
        q, weight = _heads(query, weights, row, batch, s, b, H, D, scale, BLOCK_H, BLOCK_D)
        product = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
        score = tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1)
        tl.store(scores + (batch * s + row).to(tl.int64) * g + entry, score, entry < g)


@triton.jit
def _backward_query(query, key, weights, dscores, dquery, dweights, s, b, g, H, D, scale, BLOCK_H: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr):
    """One query against all entries."""
    row, batch = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    q, weight = _heads(query, weights, row, batch, s, b, H, D, scale, BLOCK_H, BLOCK_D)
    dq, dweight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32), tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, g, BLOCK_G):
        entry = start + tl.arange(0, BLOCK_G)
        keys = _keys(key, entry, batch, b, g, D, BLOCK_D)
        product = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        dscore = tl.load(dscores + (batch * s + row).to(tl.int64) * g + entry, entry < g, 0.0)
        dweight += tl.sum(tl.maximum(product, 0.0) * dscore[None, :], 1)
        dproduct = tl.where(product > 0.0, dscore[None, :], 0.0).to(keys.dtype)
        dq = tl.dot(dproduct, keys, dq, input_precision=PRECISION)
    token = batch.to(tl.int64) + row * b
    tl.store(dquery + (token * H + head[:, None]) * D + d[None, :],
             (dq * weight[:, None]).to(dquery.dtype.element_ty), (head[:, None] < H) & (d[None, :] < D))
    tl.store(dweights + token * H + head, (dweight * scale).to(dweights.dtype.element_ty), head < H)


@triton.jit
def _backward_key(query, key, weights, dscores, parts, s, b, g, H, D, scale, BLOCK_H: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of entries against ROWS queries: parts [.., g, b, D] of the gradient of the keys."""
    batch = tl.program_id(2)
    entry, d = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * ROWS
    keys = _keys(key, entry, batch, b, g, D, BLOCK_D)
    dkeys = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, s)):
        q, weight = _heads(query, weights, row, batch, s, b, H, D, scale, BLOCK_H, BLOCK_D)
        product = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
        dscore = tl.load(dscores + (batch * s + row).to(tl.int64) * g + entry, entry < g, 0.0)
        dproduct = tl.where(product > 0.0, dscore[:, None] * weight[None, :], 0.0).to(keys.dtype)
        dkeys = tl.dot(dproduct, q, dkeys, input_precision=PRECISION)
    to = ((tl.program_id(1) * g + entry[:, None]).to(tl.int64) * b + batch) * D + d[None, :]
    tl.store(parts + to, dkeys, (entry[:, None] < g) & (d[None, :] < D))


def _shape(carrier: Carrier, query: T) -> dict:
    heads, d = query.shape[2:]
    return {"BLOCK_H": max(triton.next_power_of_2(heads), 16), "BLOCK_D": max(triton.next_power_of_2(d), 16),
            "PRECISION": "ieee" if carrier.dtype(query) == "float32" else "tf32"}


def limits(carrier: Carrier, query: T) -> str:
    """What of the shapes and dtypes the kernels do not take, "" if nothing."""
    if carrier.dtype(query) not in ("bfloat16", "float16", "float32"):
        return f"the query is {carrier.dtype(query)}: bfloat16, float16 and float32 are supported"
    heads, d = query.shape[2:]
    return "" if heads <= 128 and d <= 256 else f"{heads} heads of {d}: at most 128 heads of 256 are supported"


def forward(carrier: Carrier, query: T, key: T, weights: T, causal: tuple[int, int] | None = None, **options) -> T:
    """Contiguous query [s, b, h, d], key [g, b, d], weights [s, b, h] -> scores [b, s, g] float32.

    causal, (ratio, offset): only entries that are complete at their query, (offset + row + 1) // ratio, are sure to
    be written.
    """
    s, b, heads, d = query.shape
    g = key.shape[0]
    scores = carrier.empty([b, s, g], "float32", query)
    block = min(max(triton.next_power_of_2(g), 16), 256)
    options = {"BLOCK_G": block, "ROWS": 64, "num_warps": 8, "num_stages": 3} | options
    ratio, offset = causal or (1, 0)
    grid = triton.cdiv(g, options["BLOCK_G"]), triton.cdiv(s, options["ROWS"]), b
    carrier.launch(_forward, grid, query, key, weights, scores, s, b, g, heads, d, d**-0.5, ratio, offset,
                   CAUSAL=causal is not None, **_shape(carrier, query), **options)
    return scores


def backward(carrier: Carrier, dscores: T, query: T, key: T, weights: T, splits: int = 0, **options) -> tuple[T, T, T]:
    """dscores [b, s, g] contiguous float32 -> gradients of query, key and weights in their dtypes.

    splits: by so many ranges of queries the keys' gradient is summed apart; 0 for as many as fill the device.
    """
    s, b, heads, d = query.shape
    g = key.shape[0]
    shape = _shape(carrier, query)
    dquery, dweights = (carrier.empty(x.shape, carrier.dtype(x), x) for x in (query, weights))
    options = {"BLOCK_G": 64, "num_warps": 4, "num_stages": 2} | options
    carrier.launch(_backward_query, (s, b), query, key, weights, dscores, dquery, dweights, s, b, g, heads, d,
                   d**-0.5, **shape, **options)
    tiles = triton.cdiv(g, options["BLOCK_G"]) * b
    rows = triton.cdiv(s, splits or max(1, min(512 // tiles, s // 64)))
    count = triton.cdiv(s, rows)
    parts = carrier.empty([count, g, b, d], "float32", key)
    carrier.launch(_backward_key, (triton.cdiv(g, options["BLOCK_G"]), count, b), query, key, weights, dscores, parts,
                   s, b, g, heads, d, d**-0.5, ROWS=rows, **shape, **options)
    dkey = column_sums(carrier, parts, count, key.shape, carrier.dtype(key))
    return dquery, dkey, dweights
