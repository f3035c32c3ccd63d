"""Token rows grouped by expert, and back. Spec sections 9.4 and 9.6.

Whichever way, a program has one token and the list of its rows: a row of a token is read or written once, and rows of
one token add in ascending order. Lists are found by counting; the only atomics are on integers, whose order is
mended by a sort.

Lists of rows by token: ``starts`` int32 [tokens + 1], ``lists`` int32 [rows].
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

TOKENS = 16  # of the routing map that a program looks at


@triton.jit
def _count_map(routing, by_expert, totals, by_token, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Assignments: by_expert [experts, blocks of tokens], totals [experts] (zero before), by_token [tokens]."""
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    chosen = tl.load(routing + t.to(tl.int64)[:, None] * experts + e[None, :], inside, 0).to(tl.int32)
    count = tl.sum(chosen, 0)
    tl.store(by_expert + e * tl.num_programs(0) + tl.program_id(0), count, e < experts)
    tl.atomic_add(totals + e, count, e < experts, sem="relaxed")
    tl.store(by_token + t, tl.sum(chosen, 1), t < tokens)


@triton.jit
def _start(counts, starts, size, before, BLOCK: tl.constexpr):
    """starts [size]: ``before`` and the sum of the earlier counts. Gives what comes next."""
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(counts + i, i < size, 0)
        tl.store(starts + i, before + tl.cumsum(count, 0) - count, i < size)
        before += tl.sum(count, 0)
    return before


@triton.jit
def _start_tokens(counts, starts, tokens, BLOCK: tl.constexpr):
    """starts [tokens + 1]"""
    tl.store(starts + tokens, _start(counts, starts, tokens, tl.full([], 0, tl.int32), BLOCK))


@triton.jit
def _start_all(by_expert, totals, expert_starts, blocks, by_token, token_starts, tokens, experts,
               EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program for the starts of every expert, and one for those of the tokens."""
    expert, e = tl.program_id(0), tl.arange(0, EXPERTS)
    if expert < experts:
        before = tl.sum(tl.load(totals + e, e < expert, 0), 0)
        _start(by_expert + expert * blocks, expert_starts + expert * blocks, blocks, before, BLOCK)
    else:
        _start_tokens(by_token, token_starts, tokens, BLOCK)


@triton.jit
def _assign(routing, probs, expert_starts, token_starts, flat, token, lists, tokens, experts,
            TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Row numbers of all assignments: by experts, then by tokens. Their probabilities, tokens and lists."""
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    at = t.to(tl.int64)[:, None] * experts + e[None, :]
    chosen = tl.load(routing + at, inside, 0).to(tl.int32)
    here = inside & (chosen != 0)
    first = tl.load(expert_starts + e * tl.num_programs(0) + tl.program_id(0), e < experts, 0)
    row = first[None, :] + tl.cumsum(chosen, 0) - chosen
    tl.store(token + row, tl.broadcast_to(t[:, None], [TOKENS, EXPERTS]).to(token.dtype.element_ty), here)
    tl.store(flat + row, tl.load(probs + at, here, 0.0), here)
    place = tl.load(token_starts + t, t < tokens, 0)[:, None] + tl.cumsum(chosen, 1) - chosen
    tl.store(lists + place, row, here)


@triton.jit
def _dprobs(dflat, routing, expert_starts, dprobs, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    at = t.to(tl.int64)[:, None] * experts + e[None, :]
    chosen = tl.load(routing + at, inside, 0).to(tl.int32)
    first = tl.load(expert_starts + e * tl.num_programs(0) + tl.program_id(0), e < experts, 0)
    row = first[None, :] + tl.cumsum(chosen, 0) - chosen
    tl.store(dprobs + at, tl.load(dflat + row, inside & (chosen != 0), 0.0), inside)


@triton.jit
def _count_tokens(token, counts, rows, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts + tl.load(token + i, i < rows, 0), 1, i < rows, sem="relaxed")


@triton.jit
def _list_tokens(token, counts, starts, lists, rows, BLOCK: tl.constexpr):
    """Lists in any order; ``counts`` are zero afterwards."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(token + i, i < rows, 0)
    place = tl.atomic_add(counts + t, -1, i < rows, sem="relaxed") - 1
    tl.store(lists + tl.load(starts + t, i < rows, 0) + place, i, i < rows)


@triton.jit
def _sort_lists(token, starts, lists, ordered, rows, BLOCK: tl.constexpr):
    """A row's place in its list is the number of smaller ones."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(token + i, i < rows, 0)
    first = tl.load(starts + t, i < rows, 0)
    length = tl.load(starts + t + 1, i < rows, 0) - first
    smaller = tl.zeros([BLOCK], tl.int32)
    for k in range(tl.max(length, 0)):
        smaller += (tl.load(lists + first + k, k < length, rows) < i).to(tl.int32)
    tl.store(ordered + first + smaller, i, i < rows)


@triton.jit
def _spread(x, starts, lists, rows, C, BLOCK: tl.constexpr):
    """rows[r] = x[t] for every row r of token t."""
    t, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + t.to(tl.int64) * C + c, c < C, 0.0)
    for k in range(tl.load(starts + t), tl.load(starts + t + 1)):
        tl.store(rows + tl.load(lists + k).to(tl.int64) * C + c, v, c < C)


@triton.jit
def _gather(rows, starts, lists, out, C, BLOCK: tl.constexpr):
    """out[t] = the sum of its rows, in float32, in the order of the list."""
    t, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.load(starts + t), tl.load(starts + t + 1)):
        total += tl.load(rows + tl.load(lists + k).to(tl.int64) * C + c, c < C, 0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * C + c, total.to(out.dtype.element_ty), c < C)


def _map_tile(experts: int) -> dict[str, int]:
    return {"TOKENS": TOKENS, "EXPERTS": triton.next_power_of_2(experts), "num_warps": 8}


def _row_tile(width: int) -> dict[str, int]:
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def assign(carrier: Carrier, probs: T, routing_map: T, rows: int) -> tuple[T, T, T, T, T]:
    """probs [tokens, E] and map [tokens, E], of which ``rows`` are true -> probs of the rows, their tokens int64, and
    for :func:`spread`, :func:`gather` and :func:`probs_backward`: starts and lists by token, starts by expert."""
    (tokens, experts), blocks = probs.shape, triton.cdiv(probs.shape[0], TOKENS)
    def empty(shape, dtype="int32"):
        return carrier.empty(shape, dtype, probs)

    by_expert, by_token, totals = empty([experts * blocks]), empty([tokens]), carrier.zeros([experts], "int32", probs)
    expert_starts, starts, lists = empty([experts * blocks]), empty([tokens + 1]), empty([rows])
    flat, token, tile = empty([rows], carrier.dtype(probs)), empty([rows], "int64"), _map_tile(experts)
    carrier.launch(_count_map, (blocks,), routing_map, by_expert, totals, by_token, tokens, experts, **tile)
    carrier.launch(_start_all, (experts + 1,), by_expert, totals, expert_starts, blocks, by_token, starts, tokens,
                   experts, EXPERTS=tile["EXPERTS"], BLOCK=4096, num_warps=8)
    carrier.launch(_assign, (blocks,), routing_map, probs, expert_starts, starts, flat, token, lists, tokens, experts,
                   **tile)
    return flat, token, starts, lists, expert_starts


def probs_backward(carrier: Carrier, dflat: T, routing_map: T, expert_starts: T) -> T:
    """dflat [rows] -> dprobs [tokens, E]."""
    tokens, experts = routing_map.shape
    dprobs = carrier.empty([tokens, experts], carrier.dtype(dflat), dflat)
    carrier.launch(_dprobs, (triton.cdiv(tokens, TOKENS),), dflat, routing_map, expert_starts, dprobs, tokens, experts,
                   **_map_tile(experts))
    return dprobs


def invert(carrier: Carrier, token: T, tokens: int) -> tuple[T, T]:
    """token [rows] -> starts and lists."""
    (rows,) = token.shape
    counts = carrier.zeros([tokens], "int32", token)
    starts = carrier.empty([tokens + 1], "int32", token)
    lists, ordered = carrier.empty([rows], "int32", token), carrier.empty([rows], "int32", token)
    grid, tile = (triton.cdiv(rows, 256),), {"BLOCK": 256, "num_warps": 4}
    carrier.launch(_count_tokens, grid, token, counts, rows, **tile)
    carrier.launch(_start_tokens, (1,), counts, starts, tokens, BLOCK=4096, num_warps=8)
    carrier.launch(_list_tokens, grid, token, counts, starts, lists, rows, **tile)
    carrier.launch(_sort_lists, grid, token, starts, lists, ordered, rows, **tile)
    return starts, ordered


def spread(carrier: Carrier, x: T, starts: T, lists: T) -> T:
    """x [tokens, C] contiguous -> [rows, C]: a copy of its token for every row."""
    tokens, width = x.shape
    rows, tile = carrier.empty([lists.shape[0], width], carrier.dtype(x), x), _row_tile(width)
    carrier.launch(_spread, (tokens, triton.cdiv(width, tile["BLOCK"])), x, starts, lists, rows, width, **tile)
    return rows


def gather(carrier: Carrier, rows: T, starts: T, lists: T) -> T:
    """rows [n, C] contiguous -> [tokens, C]: the sum of each token's."""
    tokens, width = starts.shape[0] - 1, rows.shape[1]
    out, tile = carrier.empty([tokens, width], carrier.dtype(rows), rows), _row_tile(width)
    carrier.launch(_gather, (tokens, triton.cdiv(width, tile["BLOCK"])), rows, starts, lists, out, width, **tile)
    return out
