"""The forward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._forward``.

Triton itself computes the scores in both of its warpgroups, and starts a gather late. Here two warpgroups share the
scores of a tile by keys and its values by columns, and a third one gathers. Gluon has no interpreter: on a CPU only
Triton's own kernel runs.
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

from paddledsv4.kernels.hopper_keys import LOG2E, announce, barriers, far_slots, fetch, key_exists, key_rows

GATHER_REGISTERS = gl.constexpr(64)


@gluon.jit
def _weigh(score, exists, top, scale):
    """The weights of a tile against the maximum so far, by what older sums shrink, and that maximum."""
    score = gl.where(exists[None, :], score * (scale * LOG2E), float("-inf"))
    new = gl.maximum(top, gl.max(score, 1))
    finite = gl.where(new == float("-inf"), 0.0, new)  # a sink of -inf, and no key yet
    return gl.exp2(score - finite[:, None]), gl.exp2(top - finite), new


@gluon.jit
def _gather(q, kv, compressed, selected, queries, keys, arrived, full, empty, tiles, row, batch, first_head, far, s, b,
            n, K, H, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: the query, then tile after tile into the two buffers, as soon as one is free."""
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    fetch(q, queries, arrived, row, batch, first_head, b, H)
    pointers = key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    for tile in range(tiles):
        ahead = key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                          by_row)
        if tile > 0:
            announce(full.index((tile - 1) % 2))
        mbarrier.wait(empty.index(tile % 2), (tile // 2 + 1) % 2)
        async_copy.async_copy_global_to_shared(keys.index(tile % 2), pointers[:, None] + d[None, :])
        async_copy.commit_group()
        pointers = ahead
    announce(full.index((tiles - 1) % 2))


@gluon.jit
def _attend(selected, sink, out, lse, queries, keys, weights, arrived, full, empty, tiles, row, batch, first_head, far,
            s, b, n, K, H, scale, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Eight warps: the scores of a tile while the values of the one before are summed."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = queries.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    token = row.to(gl.int64) * b + batch
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    start = gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E
    top = start
    total = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    value = gl.zeros([BLOCK_H, D], gl.float32, values)
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    exists = key_exists(selected, 0, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
    mbarrier.wait(arrived, 0)
    mbarrier.wait(full.index(0), 0)
    fence_async_shared()
    score = warpgroup_mma(queries, keys.index(0).permute((1, 0)), none, use_acc=False)
    for tile in range(tiles - 1):
        weight, shrink, top = _weigh(score, exists, top, scale)
        total = total * shrink[:, None] + weight
        weights.store(weight.to(dtype))
        value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        exists = key_exists(selected, tile + 1, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        fence_async_shared()
        gl.thread_barrier()
        value = warpgroup_mma(weights, keys.index(tile % 2), value, is_async=True)
        mbarrier.wait(full.index((tile + 1) % 2), (tile + 1) // 2 % 2)
        score = warpgroup_mma(queries, keys.index((tile + 1) % 2).permute((1, 0)), none, use_acc=False, is_async=True)
        value = warpgroup_mma_wait(1, deps=(value,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(tile % 2))
        score = warpgroup_mma_wait(0, deps=(score,))
    weight, shrink, top = _weigh(score, exists, top, scale)
    total = total * shrink[:, None] + weight
    weights.store(weight.to(dtype))
    value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
    fence_async_shared()
    gl.thread_barrier()
    value = warpgroup_mma(weights, keys.index((tiles - 1) % 2), value)

    norm = gl.sum(total, 1) + gl.exp2(start - gl.where(top == float("-inf"), 0.0, top))
    gl.store(lse + token * H + mine, top + gl.log2(norm), mine < H)
    inverse = gl.convert_layout(1.0 / norm, gl.SliceLayout(1, values))
    queries.store((value * inverse[:, None]).to(dtype))
    gl.thread_barrier()
    head = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies))
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    gl.store(out + (token * H + head[:, None]) * D + d[None, :], queries.load(copies),
             (head[:, None] < H) & (d[None, :] < D))


@gluon.jit
def forward(q, kv, compressed, selected, sink, out, lse, s, b, n, g, K, H, D: gl.constexpr, ratio, offset,
            scale, WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr,
            BLOCK_N: gl.constexpr):
    """A program: one query, BLOCK_H heads. Eight warps compute, four more gather two tiles of keys."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    row, batch = gl.program_id(0), gl.program_id(1)
    first_head = gl.program_id(2) * BLOCK_H
    far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    queries = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    arrived, full, empty = barriers(1, 128), barriers(2, 1), barriers(2, 1)
    gl.thread_barrier()
    gl.warp_specialize([
        (_attend, (selected, sink, out, lse, queries, keys, weights, arrived.index(0), full, empty, tiles, row, batch,
                   first_head, far, s, b, n, K, H, scale, D, WINDOW, FAR)),
        (_gather, (q, kv, compressed, selected, queries, keys, arrived.index(0), full, empty, tiles, row, batch,
                   first_head, far, s, b, n, K, H, D, WINDOW, FAR)),
    ], [4], [GATHER_REGISTERS])
