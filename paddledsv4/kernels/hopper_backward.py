"""The backward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._backward``.

A program stays and takes query after query. Two of its warpgroups share the scores of a tile by keys and all gradients
by columns; the keys' gradient of a tile is computed and written in pieces of its columns. A third one fetches: the
tiles, and the next query while the last one ends.
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

from paddledsv4.kernels.hopper_keys import (
    LOG2E,
    announce,
    barrier,
    far_slots,
    fetch,
    key_entries,
    key_exists,
    key_pointers,
    numbers,
    store_heads,
    the_number,
    tiles_of,
    zero,
)

GATHER_REGISTERS = gl.constexpr(56)


@gluon.jit
def _gather(q, kv, compressed, selected, lse, deltas, dout, queries, douts, keys, exists, lists, lengths, full, empty,
            halves, drained, first, items, first_head, s, b, n, g, K, H, D: gl.constexpr, ratio, offset,
            WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr):
    """Four warps: whatever is read from memory, as soon as there is room for it."""
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = D // 2
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    head = first_head + gl.arange(0, BLOCK_H, by_row)
    step = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, batch = first + item // b, item % b
        heads = (first * b + item).to(gl.int64) * H
        far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
        tiles = tiles_of(far, WINDOW, BLOCK_N)
        norm = gl.load(lse + heads + head, head < H, float("inf"))  # no head: weights of zero
        delta = gl.load(deltas + heads + head, head < H, 0.0)
        entry = key_entries(selected, 0, row, far, batch, s, K, WINDOW, FAR, BLOCK_N, by_row)
        pointers = key_pointers(kv, compressed, entry, 0, row, n, b, batch, s, D, WINDOW, BLOCK_N, by_row)
        real = key_exists(entry, 0, row, n, s, WINDOW, BLOCK_N, by_row)
        for half in gl.static_range(2):
            mbarrier.wait(halves[half], (step + 1) % 2)
            fetch(q + (heads + first_head) * D, queries.index(0).slice(half * HALF, HALF, 1), H - first_head,
                  half * HALF, D)
            fetch(dout + (heads + first_head) * D, douts.index(0).slice(half * HALF, HALF, 1), H - first_head,
                  half * HALF, D)
        lists.index(0).store(norm)
        lists.index(1).store(delta)
        lengths.index(0).store(gl.full([1], tiles, gl.int32, by_row))
        mbarrier.wait(drained, (count + 1) % 2)
        for tile in range(tiles):
            entry = key_entries(selected, tile + 1, row, far, batch, s, K, WINDOW, FAR, BLOCK_N, by_row)
            mbarrier.wait(empty, (step + 1) % 2)
            async_copy.async_copy_global_to_shared(keys.index(0), pointers[:, None] + d[None, :])
            async_copy.commit_group()
            exists.index(0).store(real.to(gl.int32))
            announce(full, 0)
            pointers = key_pointers(kv, compressed, entry, tile + 1, row, n, b, batch, s, D, WINDOW, BLOCK_N, by_row)
            real = key_exists(entry, tile + 1, row, n, s, WINDOW, BLOCK_N, by_row)
            step += 1
        count += 1


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


@gluon.constexpr_function
def _held(rows, columns):
    """The layout of ``_as_held``: of 32 columns a lane has 8, so that four lanes store 64 bytes at a time."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + ([[0, 32]] if columns == 128 else [])
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0], [0, columns // 2]], [], [rows, columns])


@gluon.jit
def _as_held(part):
    """The columns of a piece in the order in which lanes hold them, so that none is exchanged before the store.
    ``inverted_index`` knows this order."""
    ROWS: gl.constexpr = part.shape[0]
    COLUMNS: gl.constexpr = part.shape[1]
    return part.reshape([ROWS, COLUMNS // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS])


@gluon.jit
def _differentiate(dq, parts, queries, douts, keys, exists, lists, lengths, weights, dscores, full, empty, halves,
                   drained, first, items, first_head, b, H, scale, slots, D: gl.constexpr, PIECE: gl.constexpr):
    """Eight warps: all that is computed. What they read is in shared memory."""
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    PIECES: gl.constexpr = D // PIECE
    dtype: gl.constexpr = queries.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    pieces: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PIECE // 2, 16])
    stores: gl.constexpr = _held(BLOCK_N, PIECE)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(1, stores)).to(gl.int64)[:, None] * D
    offsets += gl.arange(0, PIECE, gl.SliceLayout(0, stores)).to(gl.int64)[None, :]
    none = gl.zeros([BLOCK_N, PIECE], gl.float32, pieces)
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        target = parts + item.to(gl.int64) * slots * D
        dquery = gl.zeros([BLOCK_H, D], gl.float32, values)
        mbarrier.wait(full, step % 2)
        tiles = the_number(lengths.index(0))
        for _ in range(tiles):
            mbarrier.wait(full, step % 2)
            q_now, d_now, k_now = queries.index(zero(step)), douts.index(zero(step)), keys.index(zero(step))
            score = _products(q_now, k_now, scores)
            dweight = _products(d_now, k_now, scores)
            norm, delta = lists.index(0).load(by_head), lists.index(1).load(by_head)
            real = exists.index(0).load(by_key) != 0
            score = warpgroup_mma_wait(1, deps=(score,))
            weight = gl.where(real[None, :], gl.exp2(score * (scale * LOG2E) - norm[:, None]), 0.0)
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
            for piece in gl.static_range(PIECES):
                part = warpgroup_mma_wait(0, deps=(part,))
                done = part.to(dtype)
                if piece + 1 < PIECES:
                    part = _key_part(q_now, d_now, weights, dscores, none, (piece + 1) * PIECE, PIECE)
                if 2 * piece + 2 == PIECES:
                    gl.thread_barrier()
                    mbarrier.arrive(halves[0])
                held = gl.convert_layout(_as_held(done), stores, assert_trivial=True)
                gl.store(target + (piece * PIECE + offsets), held)
            gl.thread_barrier()  # both warpgroups are done with the weights
            mbarrier.arrive(halves[1])
            target += BLOCK_N * D
            step += 1
        heads = (first * b + item).to(gl.int64) * H + first_head
        store_heads(dq + heads * D, keys.index(0), dquery, H - first_head, D)
        mbarrier.arrive(drained)


@gluon.jit
def backward(q, kv, compressed, selected, lse, deltas, dout, dq, parts, first, items, first_head, s, b, n, g, K, H,
             D: gl.constexpr, ratio, offset, scale, slots, WINDOW: gl.constexpr, FAR: gl.constexpr,
             BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr):
    """A program: every so many-th of ``items`` queries from row ``first`` on, BLOCK_H heads of each."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [1, BLOCK_H, D], shared)
    douts = gl.allocate_shared_memory(dtype, [1, BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    dscores = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    exists, lengths, lists = numbers(1, BLOCK_N, gl.int32), numbers(1, 1, gl.int32), numbers(2, BLOCK_H, gl.float32)
    full, empty, halves, drained = barrier(1), barrier(1), (barrier(1), barrier(1)), barrier(1)
    gl.thread_barrier()
    gl.warp_specialize([
        (_differentiate, (dq, parts, queries, douts, keys, exists, lists, lengths, weights, dscores, full, empty,
                          halves, drained, first, items, first_head, b, H, scale, slots, D, PIECE)),
        (_gather, (q, kv, compressed, selected, lse, deltas, dout, queries, douts, keys, exists, lists, lengths, full,
                   empty, halves, drained, first, items, first_head, s, b, n, g, K, H, D, ratio, offset, WINDOW, FAR,
                   BLOCK_K)),
    ], [4], [GATHER_REGISTERS])
