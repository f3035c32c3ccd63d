"""The forward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._forward``.

What Triton's own pipeline does not give: two warpgroups that share the scores of a tile by keys and its values by
columns (Triton computes scores twice), and gathers that run through a whole iteration. Gluon has no interpreter: on a
CPU only the Triton kernel runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

GATHER_REGISTERS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D: gl.constexpr, WINDOW: gl.constexpr,
              FAR: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """As ``attention_keys.key_rows``: pointers to the keys of a tile; the own key where there is none."""
    NEAR: gl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    i = gl.arange(0, BLOCK_N, layout)
    own = row + n - s
    position = own - (WINDOW - 1) + tile * BLOCK_N + i
    position = gl.where((tile * BLOCK_N + i < WINDOW) & (position >= 0), position, own)
    pointers = kv + (position.to(gl.int64) * b + batch) * D
    if FAR != 0:
        behind = (tile - NEAR) * BLOCK_N + i
        inside = (tile >= NEAR) & (behind < far)
        if FAR == 2:
            entry = gl.load(selected + (batch * s + row).to(gl.int64) * K + behind, inside, -1)
        else:
            entry = gl.where(inside, behind, -1)
        pointers = gl.where(entry >= 0, compressed + (entry.to(gl.int64) * b + batch) * D, pointers)
    return pointers


@gluon.jit
def _key_exists(selected, tile, row, far, n, batch, s, K, WINDOW: gl.constexpr, FAR: gl.constexpr,
                BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which keys of a tile there are."""
    NEAR: gl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    i = gl.arange(0, BLOCK_N, layout)
    near = tile * BLOCK_N + i
    exists = (near < WINDOW) & (row + n - s - (WINDOW - 1) + near >= 0)
    if FAR != 0:
        behind = (tile - NEAR) * BLOCK_N + i
        inside = (tile >= NEAR) & (behind < far)
        if FAR == 2:
            inside = gl.load(selected + (batch * s + row).to(gl.int64) * K + behind, inside, -1) >= 0
        exists = gl.where(tile >= NEAR, inside, exists)
    return exists


@gluon.jit
def _weigh(score, exists, top, scale):
    """The weights of a tile against the maximum so far, by what older sums shrink, and that maximum."""
    score = gl.where(exists[None, :], score * (scale * LOG2E), float("-inf"))
    new = gl.maximum(top, gl.max(score, 1))
    finite = gl.where(new == float("-inf"), 0.0, new)  # a sink of -inf, and no key yet
    return gl.exp2(score - finite[:, None]), gl.exp2(top - finite), new


@gluon.jit
def _gather(q, kv, compressed, selected, queries, keys, arrived, full, empty, tiles, row, batch, first_head, far, s, b, n,
            K, H, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: the query, then tile after tile into the two buffers, as soon as one is free."""
    BLOCK_H: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    head = first_head + gl.arange(0, BLOCK_H, by_row)
    numbers = ((row.to(gl.int64) * b + batch) * H + head[:, None]) * D + d[None, :]
    async_copy.async_copy_global_to_shared(queries, q + numbers, mask=(head[:, None] < H) & (d[None, :] < D))
    async_copy.mbarrier_arrive(arrived, increment_count=False)
    pointers = _key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    for tile in range(tiles):
        ahead = _key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                          by_row)
        mbarrier.wait(empty.index(tile % 2), (tile // 2 + 1) % 2)
        async_copy.async_copy_global_to_shared(keys.index(tile % 2), pointers[:, None] + d[None, :])
        async_copy.mbarrier_arrive(full.index(tile % 2), increment_count=False)
        pointers = ahead


@gluon.jit
def _attend(selected, sink, out, lse, queries, keys, weights, arrived, full, empty, tiles, row, batch, first_head, far, s,
            b, n, K, H, scale, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
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
    exists = _key_exists(selected, 0, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
    mbarrier.wait(arrived, 0)
    mbarrier.wait(full.index(0), 0)
    fence_async_shared()
    score = warpgroup_mma(queries, keys.index(0).permute((1, 0)), none, use_acc=False)
    for tile in range(tiles - 1):
        weight, shrink, top = _weigh(score, exists, top, scale)
        total = total * shrink[:, None] + weight
        weights.store(weight.to(dtype))
        value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        exists = _key_exists(selected, tile + 1, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        fence_async_shared()
        gl.thread_barrier()
        value = warpgroup_mma(weights, keys.index(tile % 2), value, is_async=True)
        mbarrier.wait(full.index((tile + 1) % 2), (tile + 1) // 2 % 2)
        fence_async_shared()
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
def _far_slots(selected, row, batch, s, K, g, ratio, offset, FAR: gl.constexpr, BLOCK_K: gl.constexpr):
    """As ``attention_keys.far_slots``."""
    far = gl.to_tensor(0)
    if FAR == 1:
        far = gl.minimum(g, (offset + row + 1) // ratio)
    if FAR == 2:
        slot = gl.arange(0, BLOCK_K, gl.BlockedLayout([1], [32], [8], [0]))
        index = gl.load(selected + (batch * s + row).to(gl.int64) * K + slot, slot < K, -1)
        far = gl.max(gl.where(index >= 0, slot + 1, 0), 0)
    return far


@gluon.jit
def forward(q, kv, compressed, selected, sink, out, lse, s, b, n, g, K, H, D: gl.constexpr, ratio, offset,
            scale, WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr,
            BLOCK_N: gl.constexpr):
    """A program: one query, BLOCK_H heads. Eight warps compute, four gather."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    row, batch = gl.program_id(0), gl.program_id(1)
    first_head = gl.program_id(2) * BLOCK_H
    far = _far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N
    queries = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, 128)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), 128)
        mbarrier.init(empty.index(i), 1)
    gl.thread_barrier()
    gl.warp_specialize([
        (_attend, (selected, sink, out, lse, queries, keys, weights, arrived, full, empty, tiles, row, batch, first_head,
                   far, s, b, n, K, H, scale, D, WINDOW, FAR)),
        (_gather, (q, kv, compressed, selected, queries, keys, arrived, full, empty, tiles, row, batch, first_head, far,
                   s, b, n, K, H, D, WINDOW, FAR)),
    ], [4], [GATHER_REGISTERS])


@gluon.jit
def backward(q, kv, compressed, selected, sink, out, lse, dout, dq, dsinks, parts, first, first_head, s, b, n, g, K,
             H, D: gl.constexpr, ratio, offset, scale, slots, WINDOW: gl.constexpr, FAR: gl.constexpr,
             BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr):
    """A program: one query, BLOCK_H heads. Eight warps.

    The gradient of a tile's keys is computed and written in pieces of PIECE columns, while the next tile arrives.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    pieces: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PIECE // 2, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = q.dtype.element_ty

    row, batch = first + gl.program_id(0), gl.program_id(1)
    token = row.to(gl.int64) * b + batch
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    e = gl.arange(0, PIECE, gl.SliceLayout(0, copies))
    head = first_head + gl.arange(0, BLOCK_H, by_row)
    numbers = (token * H + head[:, None]) * D
    here = (head[:, None] < H) & (d[None, :] < D)
    here_piece = (head[:, None] < H) & (e[None, :] < D)

    queries = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    douts = gl.allocate_shared_memory(dtype, [BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    dscores = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)

    far = _far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
    tiles = (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N

    async_copy.async_copy_global_to_shared(douts, dout + numbers + d[None, :], mask=here)
    async_copy.commit_group()
    async_copy.async_copy_global_to_shared(queries, q + numbers + d[None, :], mask=here)
    pointers = _key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    async_copy.async_copy_global_to_shared(keys, pointers[:, None] + d[None, :])
    async_copy.commit_group()
    pointers = _key_rows(kv, compressed, selected, 1, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N, by_row)
    exists = _key_exists(selected, 0, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
    async_copy.wait_group(1)
    gl.thread_barrier()
    sums = gl.zeros([BLOCK_H], gl.float32, by_row)
    for piece in gl.static_range(D // PIECE):
        o = gl.load(out + numbers + piece * PIECE + e[None, :], here_piece, 0.0).to(gl.float32)
        sums += gl.sum(o * douts.slice(piece * PIECE, PIECE, 1).load(copies).to(gl.float32), 1)
    delta = gl.convert_layout(sums, by_head)
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    norm = gl.load(lse + token * H + mine, mine < H, float("inf"))  # no head: weights of zero
    rest = gl.exp2(gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E - norm)
    gl.store(dsinks + token * H + mine, -rest * delta, mine < H)

    dquery = gl.zeros([BLOCK_H, D], gl.float32, values)
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    no_piece = gl.zeros([BLOCK_N, PIECE], gl.float32, pieces)
    to_slot = gl.arange(0, BLOCK_N, by_row)
    target = parts + ((gl.program_id(0).to(gl.int64) * b + batch) * slots + to_slot[:, None]) * D + e[None, :]
    for tile in range(tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        score = warpgroup_mma(queries, keys.permute((1, 0)), none, use_acc=False, is_async=True)
        dweight = warpgroup_mma(douts, keys.permute((1, 0)), none, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(1, deps=(score,))
        weight = gl.where(exists[None, :], gl.exp2(score * (scale * LOG2E) - norm[:, None]), 0.0)
        weights.store(weight.to(dtype))
        exists = _key_exists(selected, tile + 1, row, far, n, batch, s, K, WINDOW, FAR, BLOCK_N, by_key)
        dweight = warpgroup_mma_wait(0, deps=(dweight,))
        dscores.store((weight * (dweight - delta[:, None]) * scale).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        dquery = warpgroup_mma(dscores, keys, dquery, is_async=True)
        part = warpgroup_mma(weights.permute((1, 0)), douts.slice(0, PIECE, 1), no_piece, use_acc=False, is_async=True)
        part = warpgroup_mma(dscores.permute((1, 0)), queries.slice(0, PIECE, 1), part, is_async=True)
        dquery = warpgroup_mma_wait(2, deps=(dquery,))
        gl.thread_barrier()  # both warpgroups are done with the tile's keys
        if tile + 1 < tiles:
            async_copy.async_copy_global_to_shared(keys, pointers[:, None] + d[None, :])
        async_copy.commit_group()
        pointers = _key_rows(kv, compressed, selected, tile + 2, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                             by_row)
        for piece in gl.static_range(D // PIECE):
            part = warpgroup_mma_wait(0, deps=(part,))
            done = gl.convert_layout(part.to(dtype), copies)
            if piece + 1 < D // PIECE:
                part = warpgroup_mma(weights.permute((1, 0)), douts.slice((piece + 1) * PIECE, PIECE, 1), no_piece, use_acc=False,
                                     is_async=True)
                part = warpgroup_mma(dscores.permute((1, 0)), queries.slice((piece + 1) * PIECE, PIECE, 1), part, is_async=True)
            gl.store(target + piece * PIECE, done)
        target += BLOCK_N * D
    async_copy.wait_group(0)
    queries.store(dquery.to(dtype))
    gl.thread_barrier()
    gl.store(dq + numbers + d[None, :], queries.load(copies), here)
