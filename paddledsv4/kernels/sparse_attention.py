"""Sparse attention with one shared key-value head and a sink: a program per query and block of heads.

All heads of a query see the same keys, so a tile of keys is gathered once and serves a matrix product over the heads.
Logits are in units of log 2. The sink is where the running maximum begins: it has weight one and no value.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from paddledsv4.kernels.attention_keys import ALL, LIST, NONE, far_slots, key_rows
from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import multiprocessors
from paddledsv4.kernels.inverted_index import KeyGradients
from paddledsv4.kernels.sums import column_sums

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward(q, kv, compressed, selected, sink, out, lse, s, b, n, g, K, H, D, ratio, offset, scale,
             WINDOW: tl.constexpr, FAR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    row, batch = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    token = row.to(tl.int64) * b + batch
    numbers = (token * H + head[:, None]) * D + d[None, :]
    here = (head[:, None] < H) & (d[None, :] < D)
    query = tl.load(q + numbers, here, 0.0)
    top = tl.load(sink + head, head < H, 0.0).to(tl.float32) * LOG2E
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    value = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    far = far_slots(selected, row, b, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    for tile in range(tiles):
        pointers, valid = key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D,
                                   WINDOW, FAR, BLOCK_N)
        keys = tl.load(pointers[:, None] + d[None, :], d[None, :] < D, 0.0)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        score = tl.where(valid[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a sink of -inf, and no key yet
        shrink = tl.exp2(top - finite)
        weight = tl.exp2(score - finite[:, None])
        total = total * shrink + tl.sum(weight, 1)
        value = tl.dot(weight.to(keys.dtype), keys, value * shrink[:, None], input_precision=PRECISION)
        top = new
    tl.store(out + numbers, (value / total[:, None]).to(out.dtype.element_ty), here)
    tl.store(lse + token * H + head, top + tl.log2(total), head < H)


def limits(carrier: Carrier, query: T) -> str:
    """What of the shapes and dtypes the kernels do not take, "" if nothing."""
    if carrier.dtype(query) not in ("bfloat16", "float16", "float32"):
        return f"the query is {carrier.dtype(query)}: bfloat16, float16 and float32 are supported"
    if query.shape[-1] > 512:
        return f"head dim {query.shape[-1]}: at most 512 is supported"
    return ""


HOPPER = {"BLOCK_H": 64, "BLOCK_N": 64}  # of the kernels that start more warps themselves


def _for_hopper(carrier: Carrier, query: T) -> bool:
    """Whether the kernels written for Hopper's matrix units take this; if not, Triton's own do."""
    if not isinstance(_forward, triton.JITFunction):  # interpreted
        return False
    fits = carrier.dtype(query) in ("bfloat16", "float16") and query.shape[-1] in (128, 256, 512)
    return fits and triton.runtime.driver.active.get_current_target().arch == 90


def _sizes(query: T, kv: T, compressed: T | None, selected: T | None) -> tuple[int, ...]:
    """s, b, n, g, K, H, D."""
    s, b, heads, d = query.shape
    groups = 0 if compressed is None else compressed.shape[0]
    return s, b, kv.shape[0], groups, 0 if selected is None else selected.shape[2], heads, d


def _inputs(query: T, kv: T, compressed: T | None, selected: T | None) -> tuple[T, ...]:
    """What both kernels take first; kv stands for what is absent, which they do not read."""
    return query, kv, kv if compressed is None else compressed, kv if selected is None else selected


def _shape(compressed: T | None, selected: T | None, window: int) -> dict:
    """The constants that both kernels are compiled for."""
    return {
        "WINDOW": window,
        "FAR": (NONE if compressed is None else ALL if selected is None else LIST).value,
        "BLOCK_K": triton.next_power_of_2(1 if selected is None else selected.shape[2]),
        "num_warps": 8,
    }


def _tiles(carrier: Carrier, query: T) -> dict:
    """Those of Triton's own kernels: small tiles for float32, whose products do not run on the matrix units."""
    heads, d = query.shape[2:]
    wide = carrier.dtype(query) == "float32"
    return {
        "BLOCK_H": min(max(triton.next_power_of_2(heads), 16), 16 if wide else 64),
        "BLOCK_D": max(triton.next_power_of_2(d), 16),
        "BLOCK_N": 16 if wide else 32,
        "PRECISION": "ieee" if wide else "tf32",
    }


def forward(
    carrier: Carrier, query: T, kv: T, compressed: T | None, selected: T | None, sink: T,
    window: int, ratio: int, scale: float, offset: int = 0, **options,
) -> tuple[T, T]:
    """Contiguous query [s, b, H, D], kv [n, b, D], compressed [g, b, D] or None, selected [b, s, K] integers (-1: none,
    no entry twice) or None for every complete entry, sink [H] -> out [s, b, H, D] in the dtype of query, and of every
    row of scores with its sink, log2 of the sum of their exponentials, [s, b, H] float32."""
    s, b, heads, _ = query.shape
    out, lse = carrier.empty(query.shape, carrier.dtype(query), query), carrier.empty([s, b, heads], "float32", query)
    sizes, shape = _sizes(query, kv, compressed, selected), _shape(compressed, selected, window)
    if hopper := _for_hopper(carrier, query):
        from paddledsv4.kernels.hopper_forward import forward as kernel

        meta = shape | HOPPER | {"num_warps": 4} | options
    else:
        kernel, meta = _forward, shape | _tiles(carrier, query) | options
    grid = s, b, triton.cdiv(heads, meta["BLOCK_H"])
    if hopper:
        grid = (min(math.prod(grid), multiprocessors()),)
    carrier.launch(kernel, grid, *_inputs(query, kv, compressed, selected), sink, out, lse, *sizes, ratio, offset,
                   scale, **meta)
    return out, lse


@triton.jit
def _multiply(out, dout, lse, sink, deltas, dsinks, H, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """deltas [tokens, H]: output times its gradient, which is what the softmax takes off; and the sink's gradients."""
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at, here = (token * H + head[:, None]) * D + d[None, :], (head[:, None] < H) & (d[None, :] < D)
    delta = tl.sum(tl.load(out + at, here, 0.0).to(tl.float32) * tl.load(dout + at, here, 0.0).to(tl.float32), 1)
    norm = tl.load(lse + token * H + head, head < H, float("inf"))
    rest = tl.exp2(tl.load(sink + head, head < H, 0.0).to(tl.float32) * LOG2E - norm)
    tl.store(deltas + token * H + head, delta, head < H)
    tl.store(dsinks + token * H + head, -rest * delta, head < H)


@triton.jit
def _backward(q, kv, compressed, selected, lse, deltas, dout, dq, parts, first, first_head, s, b, n, g, K,
              H, D, ratio, offset, scale, slots, WINDOW: tl.constexpr, FAR: tl.constexpr, BLOCK_K: tl.constexpr,
              BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
              CUT: tl.constexpr):
    """dq of a query, and what it adds to each of its keys: parts [.., slots, D].

    CUT: the gradient of the keys is computed in so many pieces of the head dim, for the registers' sake.
    """
    row, batch = first + tl.program_id(0), tl.program_id(1)
    head = first_head + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    token = row.to(tl.int64) * b + batch
    numbers = (token * H + head[:, None]) * D + d[None, :]
    here = (head[:, None] < H) & (d[None, :] < D)
    query, dvalue = tl.load(q + numbers, here, 0.0), tl.load(dout + numbers, here, 0.0)
    norm = tl.load(lse + token * H + head, head < H, float("inf"))  # no head: weights of zero
    delta = tl.load(deltas + token * H + head, head < H, 0.0)
    dquery = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    far = far_slots(selected, row, b, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    mine = parts + (tl.program_id(0).to(tl.int64) * b + batch) * slots * D
    PIECE: tl.constexpr = BLOCK_D // CUT
    for tile in range(tiles):
        pointers, valid = key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D,
                                   WINDOW, FAR, BLOCK_N)
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.load(pointers[:, None] + d[None, :], d[None, :] < D, 0.0)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        weight = tl.where(valid[None, :], tl.exp2(score - norm[:, None]), 0.0)
        dweight = tl.dot(dvalue, tl.trans(keys), input_precision=PRECISION)
        dscore = (weight * (dweight - delta[:, None]) * scale).to(keys.dtype)
        weight = weight.to(keys.dtype)
        dquery = tl.dot(dscore, keys, dquery, input_precision=PRECISION)
        for piece in tl.static_range(CUT):
            e = piece * PIECE + tl.arange(0, PIECE)
            if CUT == 1:
                q_piece, d_piece = query, dvalue
            else:
                within = (token * H + head[:, None]) * D + e[None, :]
                allowed = (head[:, None] < H) & (e[None, :] < D)
                q_piece, d_piece = tl.load(q + within, allowed, 0.0), tl.load(dout + within, allowed, 0.0)
            dkeys = tl.dot(tl.trans(weight), d_piece, input_precision=PRECISION)
            dkeys = tl.dot(tl.trans(dscore), q_piece, dkeys, input_precision=PRECISION)
            tl.store(mine + slot[:, None].to(tl.int64) * D + e[None, :], dkeys.to(parts.dtype.element_ty),
                     valid[:, None] & (e[None, :] < D))
    tl.store(dq + numbers, dquery.to(dq.dtype.element_ty), here)


PART_NUMBERS = 1 << 29  # at most about this many numbers are held as parts of the keys' gradients


def backward(
    carrier: Carrier, dout: T, out: T, lse: T, query: T, kv: T, compressed: T | None, selected: T | None, sink: T,
    window: int, ratio: int, scale: float, offset: int = 0, **options,
) -> tuple[T, T, T | None, T]:
    """dout like out, both contiguous, out and lse from ``forward`` -> gradients of query, kv, compressed (None for
    None) and sink in their dtypes.

    Every query writes what it adds to each of its keys; an inverted index then sums these per key, in the order of
    the queries. This goes by chunks of queries, whose parts stay under PART_NUMBERS.
    """
    s, b, heads, d = query.shape
    sizes, shape = _sizes(query, kv, compressed, selected), _shape(compressed, selected, window)
    if hopper := _for_hopper(carrier, query):
        from paddledsv4.kernels.hopper_backward import backward as kernel

        meta = shape | HOPPER | {"PIECE": min(128, d // 2)} | options
    else:
        kernel = _backward
        meta = shape | _tiles(carrier, query) | {"CUT": 2 if d > 256 else 1, "num_stages": 1} | options
    dq = carrier.empty(query.shape, carrier.dtype(query), query)
    deltas, dsinks = (carrier.empty([s, b, heads], "float32", query) for _ in range(2))
    carrier.launch(_multiply, (s * b, triton.cdiv(heads, 8)), out, dout, lse, sink, deltas, dsinks, heads, d, BLOCK_H=8,
                   BLOCK_D=triton.next_power_of_2(d), num_warps=4)
    keys = KeyGradients(carrier, query, kv, compressed, selected, window, ratio, offset, meta["BLOCK_N"],
                        held=hopper)
    chunk = max(PART_NUMBERS // (b * keys.slots * d), 1)
    step = multiprocessors() if hopper else 16  # all of them busy to the end; Triton compiles anew for odd numbers
    chunk = min(chunk if chunk < step else chunk // step * step, s)
    parts = carrier.empty([chunk, b, keys.slots, d], carrier.dtype(query), query)
    for first in range(0, s, chunk):
        rows = min(chunk, s - first)
        keys.index(first, rows)
        for first_head in range(0, heads, meta["BLOCK_H"]):
            grid, what = ((min(rows * b, multiprocessors()),), (first, rows * b)) if hopper else ((rows, b), (first,))
            carrier.launch(kernel, grid, *_inputs(query, kv, compressed, selected), lse, deltas, dout, dq, parts,
                           *what, first_head, *sizes, ratio, offset, scale, keys.slots, **meta)
            keys.add(parts, first, rows)
    return dq, *keys.results(), column_sums(carrier, dsinks, s * b, sink.shape, carrier.dtype(sink))
