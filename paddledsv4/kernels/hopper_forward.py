"""The forward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._forward``.

Triton itself computes the scores in both of its warpgroups, and starts a gather late. Here one warpgroup gathers, one
computes the weights of a tile and the left columns of the values, and one the right columns. Gluon has no
interpreter: on a CPU only Triton's own kernel runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from paddledsv4.kernels.hopper_keys import LOG2E, barriers, far_slots, fetch, key_exists, key_rows, write_half

SUM_REGISTERS, GATHER_REGISTERS = gl.constexpr(184), gl.constexpr(80)


@gluon.jit
def _weigh(score, exists, top, scale):
    """The weights of a tile against the maximum so far, by what older sums shrink, and that maximum."""
    score = gl.where(exists[None, :], score * (scale * LOG2E), float("-inf"))
    new = gl.maximum(top, gl.max(score, 1))
    finite = gl.where(new == float("-inf"), 0.0, new)  # a sink of -inf, and no key yet
    return gl.exp2(score - finite[:, None]), gl.exp2(top - finite), new


@gluon.jit
def _gather(kv, compressed, selected, keys, full, empty, tiles, row, batch, far, s, b, n, K, D: gl.constexpr,
            WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: half tile after half tile, left and right columns, as soon as its buffer is free."""
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    half = gl.arange(0, D // 2, gl.SliceLayout(0, copies))
    pointers = key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    for tile in range(tiles):
        ahead = key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                          by_row)
        for side in gl.static_range(2):
            buffer = tile % 2 * 2 + side
            mbarrier.wait(empty.index(buffer), (tile // 2 + 1) % 2)
            columns = pointers[:, None] + (side * (D // 2) + half)[None, :]
            async_copy.async_copy_global_to_shared(keys.index(buffer), columns)
            async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)
        pointers = ahead


@gluon.jit
def _score(queries, keys, full, tile, scores: gl.constexpr):
    """Start the scores of a tile: its left columns, then its right ones, as they arrive."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = keys.shape[2]
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    left = tile % 2 * 2
    mbarrier.wait(full.index(left), tile // 2 % 2)
    fence_async_shared()
    score = warpgroup_mma(queries.slice(0, HALF, 1), keys.index(left).permute((1, 0)), none, use_acc=False,
                          is_async=True)
    mbarrier.wait(full.index(left + 1), tile // 2 % 2)
    fence_async_shared()
    return warpgroup_mma(queries.slice(HALF, HALF, 1), keys.index(left + 1).permute((1, 0)), score, is_async=True)


@gluon.jit
def _hand_over(weights, shrinks, ready, taken, tile, weight, shrink):
    """Give the weights of a tile to the other warpgroup, and to the matrix unit."""
    mbarrier.wait(taken.index(tile % 2), (tile // 2 + 1) % 2)
    weights.index(tile % 2).store(weight)
    shrinks.index(tile % 2).store(shrink)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready.index(tile % 2))


@gluon.jit
def _attend(selected, sink, out, lse, queries, keys, weights, shrinks, arrived, full, empty, ready, taken, tiles, row,
            batch, first_head, far, s, b, n, K, H, scale, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: the weights of every tile, and the left columns of the values."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = queries.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    wide: gl.constexpr = gl.SliceLayout(1, values)
    token = row.to(gl.int64) * b + batch
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    top = gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E
    total = gl.where(top == float("-inf"), 0.0, gl.full([BLOCK_H], 1.0, gl.float32, by_head))
    value = gl.zeros([BLOCK_H, D // 2], gl.float32, values)
    exists = key_exists(selected, 0, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
    mbarrier.wait(arrived, 0)
    score = _score(queries, keys, full, 0, scores)
    score = warpgroup_mma_wait(0, deps=(score,))
    for tile in range(tiles - 1):
        weight, shrink, top = _weigh(score, exists, top, scale)
        _hand_over(weights, shrinks, ready, taken, tile, weight.to(dtype), shrink)
        value = value * gl.convert_layout(shrink, wide)[:, None]
        value = warpgroup_mma(weights.index(tile % 2), keys.index(tile % 2 * 2), value, is_async=True)
        score = _score(queries, keys, full, tile + 1, scores)
        total = total * shrink + gl.sum(weight, 1)
        exists = key_exists(selected, tile + 1, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        value = warpgroup_mma_wait(2, deps=(value,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(tile % 2 * 2))
        score = warpgroup_mma_wait(0, deps=(score,))
    last = tiles - 1
    weight, shrink, top = _weigh(score, exists, top, scale)
    _hand_over(weights, shrinks, ready, taken, last, weight.to(dtype), shrink)
    value = value * gl.convert_layout(shrink, wide)[:, None]
    value = warpgroup_mma(weights.index(last % 2), keys.index(last % 2 * 2), value, is_async=True)
    total = total * shrink + gl.sum(weight, 1)
    gl.store(lse + token * H + mine, top + gl.log2(total), mine < H)
    mbarrier.wait(taken.index(tiles % 2), (tiles // 2 + 1) % 2)
    shrinks.index(tiles % 2).store(1.0 / total)
    gl.thread_barrier()
    mbarrier.arrive(ready.index(tiles % 2))
    value = warpgroup_mma_wait(0, deps=(value,))
    value = value * gl.convert_layout(1.0 / total, wide)[:, None]
    write_half(out, queries, value, row, batch, first_head, b, H, 0)


@gluon.jit
def _sum_right(out, queries, keys, weights, shrinks, full, empty, ready, taken, tiles, row, batch, first_head, b, H,
               D: gl.constexpr):
    """Four warps: the right columns of the values."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    wide: gl.constexpr = gl.SliceLayout(1, values)
    value = gl.zeros([BLOCK_H, D // 2], gl.float32, values)
    for tile in range(tiles):
        mbarrier.wait(full.index(tile % 2 * 2 + 1), tile // 2 % 2)
        mbarrier.wait(ready.index(tile % 2), tile // 2 % 2)
        value = value * shrinks.index(tile % 2).load(wide)[:, None]
        fence_async_shared()
        value = warpgroup_mma(weights.index(tile % 2), keys.index(tile % 2 * 2 + 1), value)
        gl.thread_barrier()
        mbarrier.arrive(taken.index(tile % 2))
        mbarrier.arrive(empty.index(tile % 2 * 2 + 1))
    mbarrier.wait(ready.index(tiles % 2), tiles // 2 % 2)
    value = value * shrinks.index(tiles % 2).load(wide)[:, None]
    write_half(out, queries, value, row, batch, first_head, b, H, 1)


@gluon.jit
def forward(q, kv, compressed, selected, sink, out, lse, s, b, n, g, K, H, D: gl.constexpr, ratio, offset, scale,
            WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr,
            BLOCK_N: gl.constexpr):
    """A program: one query, BLOCK_H heads. Three warpgroups; two tiles of keys, in halves of their columns."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    row, batch = gl.program_id(0), gl.program_id(1)
    first_head = gl.program_id(2) * BLOCK_H
    queries = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [4, BLOCK_N, D // 2], shared)
    weights = gl.allocate_shared_memory(dtype, [2, BLOCK_H, BLOCK_N], shared)
    shrinks = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    arrived, full, empty = barriers(1, 128), barriers(4, 128), barriers(4, 1)
    ready, taken = barriers(2, 1), barriers(2, 1)
    gl.thread_barrier()
    fetch(q, queries, arrived.index(0), row, batch, first_head, b, H)
    far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    gl.warp_specialize([
        (_attend, (selected, sink, out, lse, queries, keys, weights, shrinks, arrived.index(0), full, empty, ready,
                   taken, tiles, row, batch, first_head, far, s, b, n, K, H, scale, D, WINDOW, FAR)),
        (_sum_right, (out, queries, keys, weights, shrinks, full, empty, ready, taken, tiles, row, batch, first_head, b,
                      H, D)),
        (_gather, (kv, compressed, selected, keys, full, empty, tiles, row, batch, far, s, b, n, K, D, WINDOW, FAR)),
    ], [4, 4], [SUM_REGISTERS, GATHER_REGISTERS])
