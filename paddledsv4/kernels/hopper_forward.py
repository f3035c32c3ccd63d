"""The forward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._forward``.

Triton itself computes the scores in both of its warpgroups, and starts a gather late. Here two warpgroups share the
scores of a tile by keys and its values by columns, and a third one gathers. A program stays and takes query after
query, so that the next one's first tiles arrive while the last one ends. Gluon has no interpreter: on a CPU only
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

from paddledsv4.kernels.hopper_keys import LOG2E, announce, barriers, fetch, key_rows, numbers, store_heads, the_number, tiles_of

GATHER_REGISTERS = gl.constexpr(56)
FOREVER = gl.constexpr(1 << 30)  # more tiles than there are


@gluon.jit
def _weigh(score, real, top, scale):
    """The weights of a tile against the maximum so far, by what older sums shrink, and that maximum."""
    score = gl.where(real[None, :], score * (scale * LOG2E), float("-inf"))
    new = gl.maximum(top, gl.max(score, 1))
    finite = gl.where(new == float("-inf"), 0.0, new)  # a sink of -inf, and no key yet
    return gl.exp2(score - finite[:, None]), gl.exp2(top - finite), new


@gluon.jit
def _gather(q, kv, compressed, selected, far_slots, queries, keys, exists, lengths, full, empty, free, items,
            first_head, s, b, n, K, H, D: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr):
    """Four warps: every query, and tile after tile into the two buffers, as soon as one is free."""
    BLOCK_N: gl.constexpr = keys.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, batch = item // b, item % b
        far = gl.load(far_slots + item)
        tiles = tiles_of(far, WINDOW, BLOCK_N)
        pointers, real = key_rows(kv, compressed, selected, 0, row, far, n, b, batch, s, K, D, WINDOW, FAR, BLOCK_N,
                                  by_row)
        for tile in range(tiles):
            ahead, real_ahead = key_rows(kv, compressed, selected, tile + 1, row, far, n, b, batch, s, K, D, WINDOW,
                                         FAR, BLOCK_N, by_row)
            mbarrier.wait(empty.index(turn % 2), (turn // 2 + 1) % 2)
            async_copy.async_copy_global_to_shared(keys.index(turn % 2), pointers[:, None] + d[None, :])
            exists.index(turn % 2).store(real)
            if tile == 0:
                mbarrier.wait(free, (count + 1) % 2)
                fetch(q, queries.index(0), item.to(gl.int64), first_head, H, 0, D)
                lengths.index(0).store(gl.full([1], tiles, gl.int32, by_row))
            async_copy.commit_group()
            announce(full.index(turn % 2))
            turn += 1
            pointers, real = ahead, real_ahead
        count += 1


@gluon.jit
def _attend(sink, out, lse, queries, keys, exists, lengths, weights, full, empty, free, items, first_head, H, scale,
            D: gl.constexpr):
    """Eight warps: the scores of a tile while the values of the one before are summed."""
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = queries.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    mine = first_head + gl.arange(0, BLOCK_H, by_head)
    start = gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        top = start
        total = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
        value = gl.zeros([BLOCK_H, D], gl.float32, values)
        mbarrier.wait(full.index(turn % 2), turn // 2 % 2)
        tiles = the_number(lengths.index(0))
        real = exists.index(turn % 2).load(by_key) != 0
        score = warpgroup_mma(queries.index(0), keys.index(turn % 2).permute((1, 0)), none, use_acc=False)
        for tile in range(tiles - 1):
            weight, shrink, top = _weigh(score, real, top, scale)
            total = total * shrink[:, None] + weight
            weights.store(weight.to(dtype))
            value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
            fence_async_shared()
            gl.thread_barrier()
            value = warpgroup_mma(weights, keys.index(turn % 2), value, is_async=True)
            mbarrier.wait(full.index((turn + 1) % 2), (turn + 1) // 2 % 2)
            real = exists.index((turn + 1) % 2).load(by_key) != 0
            always = turn // FOREVER  # zero, which the compiler does not know: else it keeps addresses, and spills them
            score = warpgroup_mma(queries.index(always), keys.index((turn + 1) % 2).permute((1, 0)), none,
                                  use_acc=False, is_async=True)
            value = warpgroup_mma_wait(1, deps=(value,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(turn % 2))
            turn += 1
            score = warpgroup_mma_wait(0, deps=(score,))
        gl.thread_barrier()
        mbarrier.arrive(free)
        weight, shrink, top = _weigh(score, real, top, scale)
        total = total * shrink[:, None] + weight
        weights.store(weight.to(dtype))
        value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        fence_async_shared()
        gl.thread_barrier()
        value = warpgroup_mma(weights, keys.index(turn % 2), value)
        norm = gl.sum(total, 1) + gl.exp2(start - gl.where(top == float("-inf"), 0.0, top))
        token = item.to(gl.int64)
        gl.store(lse + token * H + mine, top + gl.log2(norm), mine < H)
        value = value * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, values))[:, None]
        store_heads(out + (token * H + first_head) * D, keys.index(turn % 2), value, H - first_head)
        mbarrier.arrive(empty.index(turn % 2))
        turn += 1


@gluon.jit
def forward(q, kv, compressed, selected, far_slots, sink, out, lse, s, b, n, g, K, H, D: gl.constexpr, scale,
            WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr,
            BLOCK_N: gl.constexpr):
    """A program: every so many-th query, BLOCK_H heads. Eight warps compute, four more gather two tiles of keys."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    first_head = gl.program_id(1) * BLOCK_H
    queries = gl.allocate_shared_memory(dtype, [1, BLOCK_H, D], shared)
    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], shared)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], shared)
    exists, lengths = numbers(2, BLOCK_N, gl.int32), numbers(1, 1, gl.int32)
    full, empty, free = barriers(2, 1), barriers(2, 1), barriers(1, 1)
    gl.thread_barrier()
    gl.warp_specialize([
        (_attend, (sink, out, lse, queries, keys, exists, lengths, weights, full, empty, free.index(0), s * b,
                   first_head, H, scale, D)),
        (_gather, (q, kv, compressed, selected, far_slots, queries, keys, exists, lengths, full, empty, free.index(0),
                   s * b, first_head, s, b, n, K, H, D, WINDOW, FAR)),
    ], [4], [GATHER_REGISTERS])
