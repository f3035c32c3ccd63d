"""What both of Hopper's kernels need: ``attention_keys`` in Gluon, barriers, and how tiles come and results go."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def far_slots(selected, row, batch, s, K, g, ratio, offset, FAR: gl.constexpr, BLOCK_K: gl.constexpr):
    """As ``attention_keys.far_slots``."""
    far = gl.to_tensor(0)
    if FAR == 1:
        far = gl.minimum(g, (offset + row + 1) // ratio)
    if FAR == 2:
        slot = gl.arange(0, BLOCK_K, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
        index = gl.load(selected + (batch * s + row).to(gl.int64) * K + slot, slot < K, -1)
        far = gl.max(gl.where(index >= 0, slot + 1, 0), 0)
    return far


@gluon.jit
def tiles_of(far, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many tiles hold the window and so many slots behind it."""
    return (WINDOW + BLOCK_N - 1) // BLOCK_N + (far + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def key_entries(selected, tile, row, far, batch, s, K, WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_N: gl.constexpr,
                layout: gl.constexpr):
    """The compressed entries of a tile; -1 where there is none."""
    NEAR: gl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    behind = (tile - NEAR) * BLOCK_N + gl.arange(0, BLOCK_N, layout)
    inside = (tile >= NEAR) & (behind < far)
    if FAR == 2:
        return gl.load(selected + (batch * s + row).to(gl.int64) * K + behind, inside, -1)
    return gl.where(inside, behind, -1)


@gluon.jit
def key_positions(tile, row, n, s, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """The positions of a tile in the window; -1 where there is none."""
    slot = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout)
    return gl.where(slot < WINDOW, gl.maximum(row + n - s - (WINDOW - 1) + slot, -1), -1)


@gluon.jit
def key_pointers(kv, compressed, entry, tile, row, n, b, batch, s, D: gl.constexpr, WINDOW: gl.constexpr,
                 BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """As ``attention_keys.key_rows``: pointers to the keys of a tile; the own key where there is none."""
    position = key_positions(tile, row, n, s, WINDOW, BLOCK_N, layout)
    number = gl.where(entry >= 0, entry, gl.where(position >= 0, position, row + n - s))
    return gl.where(entry >= 0, compressed, kv) + (number * b + batch).to(gl.int64) * D


@gluon.jit
def key_exists(entry, tile, row, n, s, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which keys of a tile there are."""
    return (entry >= 0) | (key_positions(tile, row, n, s, WINDOW, BLOCK_N, layout) >= 0)


@gluon.jit
def numbers(COUNT: gl.constexpr, SIZE: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for COUNT short lists."""
    return gl.allocate_shared_memory(dtype, [COUNT, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def the_number(list):
    """Of a list of one in shared memory, as a scalar."""
    return gl.max(list.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def barrier(ARRIVALS: gl.constexpr):
    """One, in memory of its own: else the compiler lets all warps meet between its uses and a neighbour's."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, ARRIVALS)
    return barrier


@gluon.jit
def announce(full, PENDING: gl.constexpr):
    """Say that all copies but the last PENDING groups have arrived, once the tensor cores can see them."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full)


@gluon.jit
def zero(step):
    """Zero, which the compiler does not know: else it keeps the addresses of all operands, and spills them."""
    return step >> 30


@gluon.jit
def fetch(x, buffer, heads, COLUMN: gl.constexpr, D: gl.constexpr):
    """Start to copy columns of the first ``heads`` of x [.., D] into ``buffer`` [BLOCK_H, columns]."""
    BLOCK_H: gl.constexpr = buffer.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    copies: gl.constexpr = gl.BlockedLayout([16 // WARPS, 8], [4, 8], [WARPS, 1], [1, 0])
    head = gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies))
    d = COLUMN + gl.arange(0, buffer.shape[1], gl.SliceLayout(0, copies))
    at = head.to(gl.int64)[:, None] * D + d.to(gl.int64)[None, :]
    async_copy.async_copy_global_to_shared(buffer, x + at, mask=(head[:, None] < heads) & (d[None, :] < D))


@gluon.jit
def store_heads(x, buffer, value, heads, D: gl.constexpr):
    """The first ``heads`` of x [.., D] = ``value`` [BLOCK_H, columns], by way of ``buffer``, so that a lane stores 16
    bytes at a time."""
    BLOCK_H: gl.constexpr = buffer.shape[0]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    buffer.store(value.to(buffer.dtype))
    gl.thread_barrier()
    head = gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies))
    d = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, copies))
    at = head.to(gl.int64)[:, None] * D + d.to(gl.int64)[None, :]  # wide: so that all stores have one address
    gl.store(x + at, buffer.load(copies), (head[:, None] < heads) & (d[None, :] < D))
    gl.thread_barrier()
