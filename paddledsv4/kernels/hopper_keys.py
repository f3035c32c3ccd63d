"""What both of Hopper's kernels need: ``attention_keys`` in Gluon, barriers, and how a query arrives."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def key_rows(kv, compressed, selected, tile, row, far, n, b, batch, s, K, D: gl.constexpr, WINDOW: gl.constexpr,
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
def key_exists(selected, tile, row, far, n, batch, s, K, WINDOW: gl.constexpr, FAR: gl.constexpr,
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
def far_slots(selected, row, batch, s, K, g, ratio, offset, FAR: gl.constexpr, BLOCK_K: gl.constexpr):
    """As ``attention_keys.far_slots``."""
    far = gl.to_tensor(0)
    if FAR == 1:
        far = gl.minimum(g, (offset + row + 1) // ratio)
    if FAR == 2:
        slot = gl.arange(0, BLOCK_K, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        index = gl.load(selected + (batch * s + row).to(gl.int64) * K + slot, slot < K, -1)
        far = gl.max(gl.where(index >= 0, slot + 1, 0), 0)
    return far


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that complete after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), ARRIVALS)
    return barriers


@gluon.jit
def announce(full):
    """Say that all copies so far have arrived, once the tensor cores can see them."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full)


@gluon.jit
def fetch(x, buffer, arrived, row, batch, first_head, b, H):
    """Start to copy the heads of a query, of x [s, b, H, D], into ``buffer``."""
    BLOCK_H: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    d = gl.arange(0, D, gl.SliceLayout(0, copies))
    head = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, copies))
    numbers = ((row.to(gl.int64) * b + batch) * H + head[:, None]) * D + d[None, :]
    async_copy.async_copy_global_to_shared(buffer, x + numbers, mask=(head[:, None] < H) & (d[None, :] < D))
    async_copy.mbarrier_arrive(arrived, increment_count=False)
