"""The backward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._backward``.

Two warpgroups share the scores of a tile by keys and all gradients by columns; a third one gathers. The keys' gradient
of a tile is computed and written in pieces of its columns, while the next tile arrives.
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

GATHER_REGISTERS = gl.constexpr(56)


@gluon.jit
def _gather(kv, compressed, selected, keys, full, empty, tiles, row, batch, far, s, b, n, K, D: gl.constexpr,
            WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: tile after tile, as soon as its memory is free."""
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    pointers = key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    for tile in range(tiles):
        ahead = key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                         by_row)
        mbarrier.wait(empty, (tile + 1) % 2)
        async_copy.async_copy_global_to_shared(keys.index(0), pointers[:, None] + d[None, :])
        async_copy.commit_group()
        announce(full)
        pointers = ahead


@gluon.jit
def _products(rows, keys, scores: gl.constexpr):
    """Start the products of rows [BLOCK_H, D] and the keys of a tile."""
    BLOCK_H: gl.constexpr = rows.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[0]
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    return warpgroup_mma(rows, keys.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _key_part(queries, douts, weights, dscores, none, COLUMN: gl.constexpr, PIECE: gl.constexpr):
    """Start the gradient of a tile's keys in PIECE columns."""
    part = warpgroup_mma(weights.permute((1, 0)), douts.slice(COLUMN, PIECE, 1), none, use_acc=False, is_async=True)
    return warpgroup_mma(dscores.permute((1, 0)), queries.slice(COLUMN, PIECE, 1), part, is_async=True)


@gluon.jit
def _differentiate(selected, sink, out, lse, dq, dsinks, parts, queries, douts, keys, weights, dscores, arrived, full,
                   empty, tiles, row, batch, first_head, far, s, b, n, K, H, scale, D: gl.constexpr,
                   WINDOW: gl.constexpr, FAR: gl.constexpr, PIECE: gl.constexpr):
    """Eight warps: all that is computed. parts: where the query's rows begin."""
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = queries.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    pieces: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PIECE // 2, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    # as in ``pieces`` but for exchanges among four lanes, after which a lane stores 16 bytes
    more: gl.constexpr = [[0, 32]] if PIECE == 128 else []
    stores: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]] + more, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, PIECE // 2]], [], [BLOCK_N, PIECE],
    )
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    token = row.to(gl.int64) * b + batch
    head = first_head + gl.arange(0, BLOCK_H, by_row)
    d, e = gl.arange(0, D, gl.SliceLayout(0, copies)), gl.arange(0, PIECE, gl.SliceLayout(0, copies))
    numbers = (token * H + head[:, None]) * D
    mbarrier.wait(arrived.index(1), 0)
    sums = gl.zeros([BLOCK_H], gl.float32, by_row)
    for piece in gl.static_range(D // PIECE):
        o = gl.load(out + numbers + piece * PIECE + e[None, :], (head[:, None] < H) & (e[None, :] < D), 0.0)
        sums += gl.sum(o.to(gl.float32) * douts.index(0).slice(piece * PIECE, PIECE, 1).load(copies).to(gl.float32), 1)
    delta = gl.convert_layout(sums, by_head)
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    norm = gl.load(lse + token * H + mine, mine < H, float("inf"))  # no head: weights of zero
    rest = gl.exp2(gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E - norm)
    gl.store(dsinks + token * H + mine, -rest * delta, mine < H)
    dquery = gl.zeros([BLOCK_H, D], gl.float32, values)
    none = gl.zeros([BLOCK_N, PIECE], gl.float32, pieces)
    target = parts + gl.arange(0, BLOCK_N, gl.SliceLayout(1, stores))[:, None] * D
    target += gl.arange(0, PIECE, gl.SliceLayout(0, stores))[None, :]
    mbarrier.wait(arrived.index(0), 0)
    fence_async_shared()
    for tile in range(tiles):
        exists = key_exists(selected, tile, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        mbarrier.wait(full, tile % 2)
        always = tile // 65536  # zero, which the compiler does not know: else it keeps addresses, and spills them
        q_now, d_now, k_now = queries.index(always), douts.index(always), keys.index(always)
        score = _products(q_now, k_now, scores)
        dweight = _products(d_now, k_now, scores)
        score = warpgroup_mma_wait(1, deps=(score,))
        weight = gl.where(exists[None, :], gl.exp2(score * (scale * LOG2E) - norm[:, None]), 0.0)
        weights.store(weight.to(dtype))
        dweight = warpgroup_mma_wait(0, deps=(dweight,))
        dscores.store((weight * (dweight - delta[:, None]) * scale).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        dquery = warpgroup_mma(dscores, k_now, dquery, is_async=True)
        part = _key_part(q_now, d_now, weights, dscores, none, 0, PIECE)
        dquery = warpgroup_mma_wait(2, deps=(dquery,))
        gl.thread_barrier()
        mbarrier.arrive(empty)
        for piece in gl.static_range(D // PIECE):
            part = warpgroup_mma_wait(0, deps=(part,))
            done = part.to(dtype)
            if piece + 1 < D // PIECE:
                part = _key_part(q_now, d_now, weights, dscores, none, (piece + 1) * PIECE, PIECE)
            gl.store(target + piece * PIECE, gl.convert_layout(done, stores))
        target += BLOCK_N * D
        gl.thread_barrier()  # both warpgroups are done with the weights
    queries.index(0).store(dquery.to(dtype))
    gl.thread_barrier()
    gl.store(dq + numbers + d[None, :], queries.index(0).load(copies), (head[:, None] < H) & (d[None, :] < D))


@gluon.jit
def backward(q, kv, compressed, selected, sink, out, lse, dout, dq, dsinks, parts, first, first_head, s, b, n, g, K, H,
             D: gl.constexpr, ratio, offset, scale, slots, WINDOW: gl.constexpr, FAR: gl.constexpr,
             BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr):
    """A program: one query, BLOCK_H heads. Eight warps compute, four more gather one tile of keys."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    row, batch = first + gl.program_id(0), gl.program_id(1)
    target = parts + (gl.program_id(0).to(gl.int64) * b + batch) * slots * D
    queries = gl.allocate_shared_memory(dtype, [1, BLOCK_H, D], shared)
    douts = gl.allocate_shared_memory(dtype, [1, BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    dscores = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    arrived, full, empty = barriers(2, 32 * gl.num_warps()), barriers(1, 1), barriers(1, 1)
    gl.thread_barrier()
    fetch(dout, douts.index(0), arrived.index(1), row, batch, first_head, b, H)
    fetch(q, queries.index(0), arrived.index(0), row, batch, first_head, b, H)
    far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    gl.warp_specialize([
        (_differentiate, (selected, sink, out, lse, dq, dsinks, target, queries, douts, keys, weights, dscores, arrived,
                          full.index(0), empty.index(0), tiles, row, batch, first_head, far, s, b, n, K, H, scale, D,
                          WINDOW, FAR, PIECE)),
        (_gather, (kv, compressed, selected, keys, full.index(0), empty.index(0), tiles, row, batch, far, s, b, n, K, D,
                   WINDOW, FAR)),
    ], [4], [GATHER_REGISTERS])
