"""The best complete entries of every query: a threshold found bit by bit, then a compaction. A program per query.

Scores are compared as unsigned integers of the same order. The k-th largest one is built from its highest bit down;
what exceeds it is chosen, and of what equals it the entries with the lowest index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T


@triton.jit
def _ordered(scores, base, entry, complete):
    """Scores as uint32 of the same order, zero where an entry is not complete. -0.0 equals 0.0."""
    value = tl.load(scores + base + entry, entry < complete, 0.0) + 0.0
    bits = value.to(tl.uint32, bitcast=True)
    order = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(entry < complete, order, 0)


@triton.jit
def _pairwise(a, b, c, d):
    return a + c, b + d


@triton.jit
def _counts(order, low, middle, high):
    """How many are at least ``low``, ``middle`` and ``high``, in one reduction; at most 65535 each."""
    first = (order >= low).to(tl.int32) + ((order >= middle).to(tl.int32) << 16)
    both, last = tl.reduce((first, (order >= high).to(tl.int32)), 0, _pairwise)
    return both & 0xFFFF, both >> 16, last


@triton.jit
def _topk(scores, index, s, g, kept, ratio, offset, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ONE: tl.constexpr):
    """ONE: the whole row is one block, which then stays in registers. Two bits of the threshold at a time."""
    row, batch = tl.program_id(0), tl.program_id(1)
    base = (batch * s + row).to(tl.int64) * g
    out = index + (batch * s + row).to(tl.int64) * kept
    complete = tl.minimum((offset + row + 1) // ratio, g)
    wanted = tl.minimum(complete, kept)
    slot = tl.arange(0, BLOCK_K)
    tl.store(out + slot, -1, (slot >= wanted) & (slot < kept))
    entry = tl.arange(0, BLOCK)
    if complete <= kept:
        tl.store(out + slot, slot, slot < wanted)
    else:
        order = _ordered(scores, base, entry, complete)
        threshold, found, shift = tl.full([], 0, tl.uint32), complete, 30  # ``found`` are at least ``threshold``
        while (shift >= 0) & (found != wanted):
            one = tl.full([], 1, tl.uint32) << shift
            low, middle, high = threshold + one, threshold + 2 * one, threshold + 3 * one
            if ONE:
                n_low, n_middle, n_high = _counts(order, low, middle, high)
            else:
                n_low, n_middle, n_high = 0, 0, 0
                for start in range(0, complete, BLOCK):
                    part = _ordered(scores, base, start + entry, complete)
                    more_low, more_middle, more_high = _counts(part, low, middle, high)
                    n_low += more_low
                    n_middle += more_middle
                    n_high += more_high
            found = tl.where(n_low >= wanted, n_low, found)
            found = tl.where(n_middle >= wanted, n_middle, found)
            found = tl.where(n_high >= wanted, n_high, found)
            threshold = tl.where(n_high >= wanted, high, tl.where(n_middle >= wanted, middle, tl.where(
                n_low >= wanted, low, threshold)))  # fmt: skip
            shift -= 2
        # all that are at least the threshold, less the last of those that equal it
        surplus_from = tl.full([], 0, tl.int32)
        if found != wanted:
            above = 0
            for start in range(0, complete, BLOCK):
                part = order if ONE else _ordered(scores, base, start + entry, complete)
                above += tl.sum((part > threshold).to(tl.int32), 0)
            surplus_from = wanted - above
        ties, done = 0, 0
        for start in range(0, complete, BLOCK):
            part = order if ONE else _ordered(scores, base, start + entry, complete)
            chosen = (part >= threshold) & (start + entry < complete)
            if found != wanted:
                equal = (chosen & (part == threshold)).to(tl.int32)
                chosen = chosen & ((equal == 0) | (ties + tl.cumsum(equal, 0) <= surplus_from))
                ties += tl.sum(equal, 0)
            to = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(out + to, start + entry, chosen)
            done += tl.sum(chosen.to(tl.int32), 0)


IN_REGISTERS = 16384


def forward(carrier: Carrier, scores: T, topk: int, ratio: int, offset: int = 0, **options) -> T:
    """Contiguous scores [b, s, g] float32 -> [b, s, min(topk, g)] int32, ascending, then -1: none.

    Row r is the query of position i = offset + r; entry c is complete there when c < (i+1) // ratio. Scores that tie:
    the lowest entries.
    """
    b, s, g = scores.shape
    kept = min(topk, g)
    index = carrier.empty([b, s, kept], "int32", scores)
    block = min(max(triton.next_power_of_2(g), 16), IN_REGISTERS)
    options = {"num_warps": min(max(block // 2048, 2), 16)} | options
    carrier.launch(_topk, (s, b), scores, index, s, g, kept, ratio, offset, BLOCK=block,
                   BLOCK_K=triton.next_power_of_2(kept), ONE=block >= g, **options)
    return index
