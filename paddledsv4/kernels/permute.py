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
COLUMNS, BLOCKS = 8, 256  # experts and blocks of tokens that a program of the index looks at


@triton.jit
def _chosen(routing, t, e, tokens, experts):
    """Tiles [EXPERTS, TOKENS] of the map: what is inside, where it lies, and 1 where a token has the expert. A thread
    has one expert and all tokens (the contiguity that is given away sees to it), so that it adds over them alone."""
    inside = (e < experts)[:, None] & (t < tokens)[None, :]
    at = t.to(tl.int64)[None, :] * experts + e[:, None]
    return inside, at, tl.load(tl.max_contiguous(routing + at, [1, 1]), inside, 0).to(tl.int32)


@triton.jit
def _count_map(routing, counts, totals, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Assignments of a block of tokens: counts [blocks, experts], totals [blocks]."""
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    count = tl.sum(_chosen(routing, t, e, tokens, experts)[2], 1)
    tl.store(counts + tl.program_id(0) * experts + e, count, e < experts)
    tl.store(totals + tl.program_id(0), tl.sum(count, 0))


@triton.jit
def _start_tokens(counts, starts, tokens, BLOCK: tl.constexpr):
    """starts [tokens + 1]: the sum of the earlier counts."""
    before = tl.full([], 0, tl.int32)
    for first in range(0, tokens, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(counts + i, i < tokens, 0)
        tl.store(starts + i, before + tl.cumsum(count, 0) - count, i < tokens)
        before += tl.sum(count, 0)
    tl.store(starts + tokens, before)


@triton.jit
def _add_before(counts, starts, size, columns, c, BLOCK: tl.constexpr):
    """starts [size, columns]: the sum of the earlier rows of counts, columns c. Gives the sum of all rows."""
    before = tl.zeros(c.shape, tl.int32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)[:, None]
        at, inside = i * columns + c[None, :], (i < size) & (c < columns)[None, :]
        count = tl.load(counts + at, inside, 0)
        tl.store(starts + at, before[None, :] + tl.cumsum(count, 0) - count, inside)
        before += tl.sum(count, 0)
    return before


@triton.jit
def _start_blocks(counts, starts, by_expert, totals, block_starts, blocks, experts, COLUMNS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Where a block's rows start within each expert's, and within all by token. by_expert: how many an expert has."""
    c = tl.arange(0, COLUMNS)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        c += tl.program_id(0) * COLUMNS
        tl.store(by_expert + c, _add_before(counts, starts, blocks, experts, c, BLOCK), c < experts)
    else:
        _add_before(totals, block_starts, blocks, 1, c, BLOCK)


@triton.jit
def _assign(routing, probs, starts, by_expert, block_starts, flat, token, token_starts, lists, tokens, experts,
            TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Row numbers of all assignments: by experts, then by tokens. Their probabilities, tokens and lists. ``starts``
    become those of the rows."""
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside, at, chosen = _chosen(routing, t, e, tokens, experts)
    here = inside & (chosen != 0)
    of_expert, mine = tl.load(by_expert + e, e < experts, 0), starts + tl.program_id(0) * experts + e
    first = tl.load(mine, e < experts, 0) + tl.cumsum(of_expert, 0) - of_expert
    tl.store(mine, first, e < experts)
    row = first[:, None] + tl.cumsum(chosen, 1) - chosen
    tl.store(token + row, tl.broadcast_to(t[None, :], [EXPERTS, TOKENS]).to(token.dtype.element_ty), here)
    tl.store(flat + row, tl.load(tl.max_contiguous(probs + at, [1, 1]), here, 0.0), here)
    along = tl.load(routing + t.to(tl.int64)[:, None] * experts + e[None, :],
                    (t < tokens)[:, None] & (e < experts)[None, :], 0).to(tl.int32)
    count = tl.sum(along, 1)
    begin = tl.load(block_starts + tl.program_id(0)) + tl.cumsum(count, 0) - count
    tl.store(token_starts + t, begin, t < tokens)
    tl.store(token_starts + tokens, tl.max(begin + count, 0), tl.program_id(0) == tl.num_programs(0) - 1)
    tl.store(lists + tl.trans(begin[:, None] + tl.cumsum(along, 1) - along), row, here)


@triton.jit
def _dprobs(dflat, routing, starts, dprobs, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """The row of every assignment once more, and its gradient; zeros elsewhere."""
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside, at, chosen = _chosen(routing, t, e, tokens, experts)
    first = tl.load(starts + tl.program_id(0) * experts + e, e < experts, 0)
    row = first[:, None] + tl.cumsum(chosen, 1) - chosen
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
    return {"TOKENS": TOKENS, "EXPERTS": triton.next_power_of_2(experts), "num_warps": 4}


def _row_tile(width: int) -> dict[str, int]:
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def assign(carrier: Carrier, probs: T, routing_map: T, rows: int) -> tuple[T, T, T, T, T]:
    """probs [tokens, E] and map [tokens, E], of which ``rows`` are true -> probs of the rows, their tokens int64, and
    for :func:`spread`, :func:`gather` and :func:`probs_backward`: starts and lists by token, starts by expert."""
    (tokens, experts), blocks = probs.shape, triton.cdiv(probs.shape[0], TOKENS)
    def empty(shape, dtype="int32"):
        return carrier.empty(shape, dtype, probs)

    counts, totals, by_expert = empty([blocks, experts]), empty([blocks]), empty([experts])
    block_starts, starts = empty([blocks]), empty([blocks, experts])
    flat, token, tile = empty([rows], carrier.dtype(probs)), empty([rows], "int64"), _map_tile(experts)
    token_starts, lists = empty([tokens + 1]), empty([rows])
    carrier.launch(_count_map, (blocks,), routing_map, counts, totals, tokens, experts, **tile)
    carrier.launch(_start_blocks, (triton.cdiv(experts, COLUMNS) + 1,), counts, starts, by_expert, totals,
                   block_starts, blocks, experts, COLUMNS=COLUMNS, BLOCK=BLOCKS, num_warps=8)
    carrier.launch(_assign, (blocks,), routing_map, probs, starts, by_expert, block_starts, flat, token, token_starts,
                   lists, tokens, experts, **tile)
    return flat, token, token_starts, lists, starts


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
