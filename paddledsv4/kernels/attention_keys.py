"""Which keys a query of sparse attention sees: its list of slots, cut into tiles of BLOCK_N.

The first tiles hold the ``window`` positions up to the query's own, ascending; the ones behind them the compressed
entries, by an index list or all complete ones. kv [n, b, D], compressed [g, b, D], selected [b, s, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALL, LIST = (tl.constexpr(i) for i in range(3))  # which compressed entries there are for a query


@triton.jit
def far_slots(selected, row, b, batch, s, K, g, ratio, offset, FAR: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many slots behind the window may hold an entry: none after the last index that is not -1."""
    if FAR == NONE:
        count = 0
    elif FAR == ALL:
        count = tl.minimum(g, (offset + row + 1) // ratio)
    else:
        slot = tl.arange(0, BLOCK_K)
        index = tl.load(selected + (batch * s + row).to(tl.int64) * K + slot, slot < K, -1)
        count = tl.max(tl.where(index >= 0, slot + 1, 0), 0)
    return count


@triton.jit
def key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D, WINDOW: tl.constexpr,
             FAR: tl.constexpr, BLOCK_N: tl.constexpr):
    """The BLOCK_N keys of a tile: pointers to their first numbers, and which of them there are.

    Where there is none the pointer is that of the query's own key: whatever is read and then weighed with zero must
    be finite, and of no later position.
    """
    NEAR: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    i = tl.arange(0, BLOCK_N)
    own = row + n - s
    near = tile * BLOCK_N + i
    position = own - (WINDOW - 1) + near
    valid = (near < WINDOW) & (position >= 0)
    position = tl.where(valid, position, own)
    pointers = kv + (position.to(tl.int64) * b + batch) * D
    if FAR != NONE:
        behind = (tile - NEAR) * BLOCK_N + i
        is_far = tile >= NEAR
        inside = is_far & (behind < far)
        if FAR == LIST:
            entry = tl.load(selected + (batch * s + row).to(tl.int64) * K + behind, inside, -1)
        else:
            entry = tl.where(inside, behind, -1)
        exists = entry >= 0
        pointers = tl.where(exists, compressed + (entry.to(tl.int64) * b + batch) * D, pointers)
        valid = tl.where(is_far, exists, valid)
    return pointers, valid
