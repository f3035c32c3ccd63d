"""What both of Hopper's kernels need: ``attention_keys`` in Gluon, barriers, and how a query and its keys arrive."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D: gl.constexpr, WINDOW: gl.constexpr,
             FAR: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """As ``attention_keys.key_rows``: pointers to the keys of a tile, the own key where there is none; which exist."""
    NEAR: gl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    i = gl.arange(0, BLOCK_N, layout)
    own = row + n - s
    position = own - (WINDOW - 1) + tile * BLOCK_N + i
    exists = (tile * BLOCK_N + i < WINDOW) & (position >= 0)
    pointers = kv + (gl.where(exists, position, own).to(gl.int64) * b + batch) * D
    if FAR != 0:
        behind = (tile - NEAR) * BLOCK_N + i
        inside = (tile >= NEAR) & (behind < far)
        if FAR == 2:
            entry = gl.load(selected + (batch * s + row).to(gl.int64) * K + behind, inside, -1)
        else:
            entry = gl.where(inside, behind, -1)
        pointers = gl.where(entry >= 0, compressed + (entry.to(gl.int64) * b + batch) * D, pointers)
        exists = gl.where(tile >= NEAR, entry >= 0, exists)
    return pointers, exists.to(gl.int32)


@gluon.jit
def tiles_of(far, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many tiles hold the window and so many slots behind it."""
    return (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that complete after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), ARRIVALS)
    return barriers


@gluon.jit
def numbers(COUNT: gl.constexpr, SIZE: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for COUNT short lists."""
    return gl.allocate_shared_memory(dtype, [COUNT, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def the_number(list):
    """Of a list of one in shared memory, as a scalar."""
    return gl.max(list.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def announce(full):
    """Say that all copies so far have arrived, once the tensor cores can see them."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full)


@gluon.jit
def fetch(x, buffer, token, first_head, H, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
    """Start to copy columns of the heads of a query, of x [tokens, H, D], into ``buffer``."""
    BLOCK_H: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    d = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, copies))
    head = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies))
    pointers = x + (token * H + head[:, None]) * D + d[None, :]
    async_copy.async_copy_global_to_shared(buffer.slice(COLUMN, COLUMNS, 1), pointers,
                                           mask=(head[:, None] < H) & (d[None, :] < D))



@gluon.jit
def store_heads(x, buffer, value, heads):
    """The first ``heads`` of x [.., D] = ``value`` [BLOCK_H, D], by way of ``buffer``, so that a lane stores 16 bytes at a
    time."""
    BLOCK_H: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    buffer.store(value.to(buffer.dtype))
    gl.thread_barrier()
    head, d = gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies)), gl.arange(0, D, gl.SliceLayout(0, copies))
    gl.store(x + (head[:, None] * D + d[None, :]), buffer.load(copies), (head[:, None] < heads) & (d[None, :] < D))
    gl.thread_barrier()
