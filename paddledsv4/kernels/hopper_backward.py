"""The backward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._backward``.

One warpgroup computes the weights of a tile, another one the gradients of its scores; then each takes half of the
columns of the query's gradient and of the keys' gradients. A third one gathers.
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

SCORE_REGISTERS, GATHER_REGISTERS = gl.constexpr(216), gl.constexpr(72)


@gluon.jit
def _gather(kv, compressed, selected, keys, full, empty, tiles, row, batch, far, s, b, n, K, D: gl.constexpr,
            WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: tile after tile, left and right columns, as soon as they are free."""
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    half = gl.arange(0, D // 2, gl.SliceLayout(0, copies))
    pointers = key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    for tile in range(tiles):
        ahead = key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                         by_row)
        for side in gl.static_range(2):
            mbarrier.wait(empty.index(side), (tile + 1) % 2)
            columns = pointers[:, None] + (side * (D // 2) + half)[None, :]
            async_copy.async_copy_global_to_shared(keys.index(side), columns)
            async_copy.mbarrier_arrive(full.index(side), increment_count=False)
        pointers = ahead


@gluon.jit
def _products(rows, keys, full, tile, scores: gl.constexpr):
    """rows [BLOCK_H, D] times the keys of a tile, as they arrive."""
    BLOCK_H: gl.constexpr = rows.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = keys.shape[2]
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    mbarrier.wait(full.index(0), tile % 2)
    fence_async_shared()
    product = warpgroup_mma(rows.slice(0, HALF, 1), keys.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(full.index(1), tile % 2)
    fence_async_shared()
    product = warpgroup_mma(rows.slice(HALF, HALF, 1), keys.index(1).permute((1, 0)), product, is_async=True)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _key_part(queries, douts, weights, dscores, none, COLUMN: gl.constexpr, PIECE: gl.constexpr):
    """Start the gradient of a tile's keys in PIECE columns."""
    part = warpgroup_mma(weights.permute((1, 0)), douts.slice(COLUMN, PIECE, 1), none, use_acc=False, is_async=True)
    return warpgroup_mma(dscores.permute((1, 0)), queries.slice(COLUMN, PIECE, 1), part, is_async=True)


@gluon.jit
def _add_half(dquery, parts, queries, douts, keys, weights, dscores, empty, tile, D: gl.constexpr, PIECE: gl.constexpr,
              SIDE: gl.constexpr):
    """Half of the columns: what a tile adds to the query's gradient, and what it gets itself, PIECE at a time.

    parts: where the tile's rows begin. A lane stores 16 bytes, after exchanges among four.
    """
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = D // 2
    dtype: gl.constexpr = queries.dtype
    pieces: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    more: gl.constexpr = [[0, 32], [0, 64]] if PIECE == 128 else [[0, 32]]
    stores: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]] + more, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [BLOCK_N, PIECE],
    )
    none = gl.zeros([BLOCK_N, PIECE], gl.float32, pieces)
    target = parts + gl.arange(0, BLOCK_N, gl.SliceLayout(1, stores))[:, None] * D
    target += SIDE * HALF + gl.arange(0, PIECE, gl.SliceLayout(0, stores))[None, :]
    fence_async_shared()
    dquery = warpgroup_mma(dscores, keys.index(SIDE), dquery, is_async=True)
    part = _key_part(queries, douts, weights, dscores, none, SIDE * HALF, PIECE)
    dquery = warpgroup_mma_wait(2, deps=(dquery,))
    gl.thread_barrier()
    mbarrier.arrive(empty.index(SIDE))
    for piece in gl.static_range(HALF // PIECE):
        part = warpgroup_mma_wait(0, deps=(part,))
        done = part.to(dtype)
        if piece + 1 < HALF // PIECE:
            part = _key_part(queries, douts, weights, dscores, none, SIDE * HALF + (piece + 1) * PIECE, PIECE)
        gl.store(target + piece * PIECE, gl.convert_layout(done, stores))
    return dquery


@gluon.jit
def _weigh(selected, lse, dq, parts, queries, douts, keys, weights, dscores, arrived, full, empty, ready, scored, free,
           tiles, row, batch, first_head, far, s, b, n, K, H, scale, D: gl.constexpr, WINDOW: gl.constexpr,
           FAR: gl.constexpr, PIECE: gl.constexpr):
    """Four warps: the weights of every tile; left columns."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    mine = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, scores))
    token = row.to(gl.int64) * b + batch
    norm = gl.load(lse + token * H + mine, mine < H, float("inf"))  # no head: weights of zero
    dquery = gl.zeros([BLOCK_H, D // 2], gl.float32, values)
    mbarrier.wait(arrived.index(0), 0)
    for tile in range(tiles):
        exists = key_exists(selected, tile, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        score = _products(queries, keys, full, tile, scores)
        weight = gl.where(exists[None, :], gl.exp2(score * (scale * LOG2E) - norm[:, None]), 0.0)
        mbarrier.wait(free.index(1), (tile + 1) % 2)
        weights.store(weight.to(queries.dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready)
        mbarrier.wait(arrived.index(1), 0)
        mbarrier.wait(scored, tile % 2)
        dquery = _add_half(dquery, parts + tile * BLOCK_N * D, queries, douts, keys, weights, dscores, empty, tile, D,
                           PIECE, 0)
        gl.thread_barrier()
        mbarrier.arrive(free.index(0))
    write_half(dq, queries, dquery, row, batch, first_head, b, H, 0)


@gluon.jit
def _differentiate(sink, out, lse, dq, dsinks, parts, queries, douts, keys, weights, dscores, arrived, full, empty,
                   ready, scored, free, tiles, row, batch, first_head, b, H, scale, D: gl.constexpr,
                   PIECE: gl.constexpr):
    """Four warps: the gradients of the scores of every tile, and of the sink; right columns."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    CHUNK: gl.constexpr = D // 4
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    token = row.to(gl.int64) * b + batch
    head = first_head + gl.arange(0, BLOCK_H, by_row)
    e = gl.arange(0, CHUNK, gl.SliceLayout(0, copies))
    numbers = (token * H + head[:, None]) * D + e[None, :]
    here = (head[:, None] < H) & (e[None, :] < D)
    mbarrier.wait(arrived.index(0), 0)
    mbarrier.wait(arrived.index(1), 0)
    sums = gl.zeros([BLOCK_H], gl.float32, by_row)
    for chunk in gl.static_range(D // CHUNK):
        o = gl.load(out + numbers + chunk * CHUNK, here, 0.0).to(gl.float32)
        sums += gl.sum(o * douts.slice(chunk * CHUNK, CHUNK, 1).load(copies).to(gl.float32), 1)
    delta = gl.convert_layout(sums, by_head)
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    norm = gl.load(lse + token * H + mine, mine < H, float("inf"))
    rest = gl.exp2(gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E - norm)
    gl.store(dsinks + token * H + mine, -rest * delta, mine < H)
    dquery = gl.zeros([BLOCK_H, D // 2], gl.float32, values)
    for tile in range(tiles):
        dweight = _products(douts, keys, full, tile, scores)
        mbarrier.wait(ready, tile % 2)
        weight = weights.load(scores).to(gl.float32)
        mbarrier.wait(free.index(0), (tile + 1) % 2)
        dscores.store((weight * (dweight - delta[:, None]) * scale).to(queries.dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(scored)
        dquery = _add_half(dquery, parts + tile * BLOCK_N * D, queries, douts, keys, weights, dscores, empty, tile, D,
                           PIECE, 1)
        gl.thread_barrier()
        mbarrier.arrive(free.index(1))
    write_half(dq, queries, dquery, row, batch, first_head, b, H, 1)


@gluon.jit
def backward(q, kv, compressed, selected, sink, out, lse, dout, dq, dsinks, parts, first, first_head, s, b, n, g, K, H,
             D: gl.constexpr, ratio, offset, scale, slots, WINDOW: gl.constexpr, FAR: gl.constexpr,
             BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr):
    """A program: one query, BLOCK_H heads. Three warpgroups; one tile of keys, in halves of its columns."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    row, batch = first + gl.program_id(0), gl.program_id(1)
    target = parts + (gl.program_id(0).to(gl.int64) * b + batch) * slots * D
    queries = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    douts = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D // 2], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    dscores = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    arrived, full, empty = barriers(2, 128), barriers(2, 128), barriers(2, 1)
    ready, scored, free = barriers(1, 1), barriers(1, 1), barriers(2, 1)
    gl.thread_barrier()
    fetch(q, queries, arrived.index(0), row, batch, first_head, b, H)
    fetch(dout, douts, arrived.index(1), row, batch, first_head, b, H)
    far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    gl.warp_specialize([
        (_weigh, (selected, lse, dq, target, queries, douts, keys, weights, dscores, arrived, full, empty,
                  ready.index(0), scored.index(0), free, tiles, row, batch, first_head, far, s, b, n, K, H, scale, D,
                  WINDOW, FAR, PIECE)),
        (_differentiate, (sink, out, lse, dq, dsinks, target, queries, douts, keys, weights, dscores, arrived, full,
                          empty, ready.index(0), scored.index(0), free, tiles, row, batch, first_head, b, H, scale, D,
                          PIECE)),
        (_gather, (kv, compressed, selected, keys, full, empty, tiles, row, batch, far, s, b, n, K, D, WINDOW, FAR)),
    ], [4, 4], [SCORE_REGISTERS, GATHER_REGISTERS])
