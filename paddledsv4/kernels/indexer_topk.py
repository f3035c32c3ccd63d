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
def _topk(scores, index, s, g, K, kept, ratio, offset, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ONE: tl.constexpr):
    """ONE: the whole row is one block, which then stays in registers."""
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
        threshold = tl.full([], 0, tl.uint32)
        for bit in range(32):
            candidate = threshold | (tl.full([], 0x80000000, tl.uint32) >> bit)
            if ONE:
                count = tl.sum((order >= candidate).to(tl.int32), 0)
            else:
                count = 0
                for start in range(0, complete, BLOCK):
                    part = _ordered(scores, base, start + entry, complete)
                    count += tl.sum((part >= candidate).to(tl.int32), 0)
            threshold = tl.where(count >= wanted, candidate, threshold)
        above = 0
        for start in range(0, complete, BLOCK):
            part = order if ONE else _ordered(scores, base, start + entry, complete)
            above += tl.sum((part > threshold).to(tl.int32), 0)
        ties, done = 0, 0
        for start in range(0, complete, BLOCK):
            part = order if ONE else _ordered(scores, base, start + entry, complete)
            ties_here = ((part == threshold) & (start + entry < complete)).to(tl.int32)
            rank = ties + tl.cumsum(ties_here, 0)
            chosen = (part > threshold) | ((ties_here > 0) & (rank <= wanted - above))
            to = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(out + to, start + entry, chosen)
            ties += tl.sum(ties_here, 0)
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
    options = {"num_warps": min(max(block // 512, 1), 16)} | options
    carrier.launch(_topk, (s, b), scores, index, s, g, topk, kept, ratio, offset, BLOCK=block,
                   BLOCK_K=triton.next_power_of_2(kept), ONE=block >= g, **options)
    return index
