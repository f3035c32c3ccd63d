"""The forward pass of sparse attention written for Hopper in Gluon: the formula of ``sparse_attention._forward``.

Two warpgroups take turns: the left one computes the scores and weights of the even tiles of keys, the right one those
of the odd tiles, and each multiplies all weights with its half of the values' columns. So the softmax of one runs while
the matrix units work for the other. Four more warps gather, each one half of the columns of every other tile, and a
program goes from query to query, so that a query's first keys arrive while the one before is finished. Gluon has no
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

COMPUTE_REGISTERS, GATHER_REGISTERS = gl.constexpr(208), gl.constexpr(88)
LEFT, RIGHT = gl.constexpr(0), gl.constexpr(1)


@gluon.jit
def _place(item, items, b, H, BLOCK_H: gl.constexpr):
    """Row, batch and first head of a piece of work: the last rows first, as the first ones, of few keys, end sooner
    where a round is not full."""
    blocks = (H + BLOCK_H - 1) // BLOCK_H
    item = items - 1 - item
    token = item // blocks
    return token // b, token % b, item % blocks * BLOCK_H


@gluon.jit
def _into_cache(pointers):
    """Into the L2 cache."""
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _prefetch(q, selected, item, items, b, s, K, H, D: gl.constexpr, HALF: gl.constexpr, FAR: gl.constexpr,
              BLOCK_H: gl.constexpr):
    """Half of a query's columns and half of its list, into the L2 cache, while the query before is attended to."""
    row, batch, first_head = _place(item, items, b, H, BLOCK_H)
    LINES: gl.constexpr = D // 2 // 64  # of a half row
    i = gl.arange(0, BLOCK_H * LINES, gl.BlockedLayout([1], [32], [1], [0]))
    head = gl.minimum(first_head + i // LINES, H - 1)
    _into_cache(q + ((row.to(gl.int64) * b + batch) * H + head) * D + HALF * (D // 2) + i % LINES * 64)
    if FAR == 2:
        j = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        _into_cache(selected + (batch * s + row).to(gl.int64) * K + gl.minimum((HALF * 32 + j) * 32, K - 1))


@gluon.jit
def _gather(tensors, memory, notes, signals, sizes, SIDE: gl.constexpr, HALF: gl.constexpr, WINDOW: gl.constexpr,
            FAR: gl.constexpr, BLOCK_K: gl.constexpr):
    """One warp: half of the columns of one side's tiles, each as soon as its memory is free; the first half brings
    along how many pairs of tiles the query has and what is added to its scores: -inf where there is no key."""
    q, kv, compressed, selected = tensors
    queries, keys, _ = memory
    biases, counts = notes
    arrived, full, empty, ready, _ = signals
    items, s, b, n, g, K, H, ratio, offset = sizes
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    WIDTH: gl.constexpr = keys.shape[2]
    D: gl.constexpr = 2 * WIDTH
    PART: gl.constexpr = 2 * SIDE + HALF
    copies: gl.constexpr = gl.BlockedLayout([16, 8], [4, 8], [1, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, copies)
    d = HALF * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, copies))
    step = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, batch, first_head = _place(item, items, b, H, BLOCK_H)
        if SIDE == RIGHT:  # the odd tiles are free later than the query's memory
            mbarrier.wait(ready[RIGHT], (step + 1) % 2)  # the last scores of the query before
            fetch(q + ((row.to(gl.int64) * b + batch) * H + first_head) * D, queries.index(HALF), H - first_head,
                  HALF * WIDTH, D)
            async_copy.commit_group()
            ahead = gl.minimum(item + gl.num_programs(0), items - 1)
            _prefetch(q, selected, ahead, items, b, s, K, H, D, HALF, FAR, BLOCK_H)
        far = far_slots(selected, row, batch, s, K, g, ratio, offset, FAR, BLOCK_K)
        pairs = (tiles_of(far, WINDOW, BLOCK_N) + 1) // 2
        limit = K if FAR == 2 else far  # behind the last entry -1 follows; of K more is known when this is compiled
        entry = key_entries(selected, SIDE, row, limit, batch, s, K, WINDOW, FAR, BLOCK_N, by_row)
        for pair in range(pairs):
            tile = 2 * pair + SIDE
            pointers = key_pointers(kv, compressed, entry, tile, row, n, b, batch, s, D, WINDOW, BLOCK_N, by_row)
            exists = key_exists(entry, tile, row, n, s, WINDOW, BLOCK_N, by_row)
            mbarrier.wait(empty[PART], (step + 1) % 2)
            async_copy.async_copy_global_to_shared(keys.index(PART), pointers[:, None] + d[None, :])
            async_copy.commit_group()
            if HALF == 0:
                biases.index(SIDE).store(gl.where(exists, 0.0, float("-inf")))
                counts.index(SIDE).store(gl.full([1], pairs, gl.int32, by_row))
            entry = key_entries(selected, tile + 2, row, limit, batch, s, K, WINDOW, FAR, BLOCK_N, by_row)
            if SIDE == RIGHT:
                if pair == 0:
                    announce(arrived, 1)
            announce(full[PART], 0)
            step += 1


@gluon.jit
def _score_half(queries, keys, full, step, score, HALF: gl.constexpr, SIDE: gl.constexpr):
    """Start one half of the products of the query and this side's tile once it is there."""
    mbarrier.wait(full[2 * SIDE + HALF], step % 2)
    part = keys.index(2 * SIDE + HALF + zero(step)).permute((1, 0))
    return warpgroup_mma(queries.index(HALF + zero(step)), part, score, use_acc=HALF == 1, is_async=True)


@gluon.jit
def _free(empty, SIDE: gl.constexpr, TILES: gl.constexpr, free=True):
    """This side has read its columns of a tile."""
    gl.thread_barrier()
    mbarrier.arrive(empty[2 * TILES + SIDE], pred=free)


@gluon.jit
def _shrink(top, new):
    """By what older sums shrink."""
    return gl.exp2(top - gl.where(new == float("-inf"), 0.0, new))  # a sink of -inf, and no key yet


@gluon.jit
def _weigh(score, bias, weights, tops, top, total, scale, ready, SIDE: gl.constexpr):
    """The weights of a tile against the maximum so far, given to the other side together with that maximum."""
    score = score * (scale * LOG2E) + bias[None, :]
    new = gl.maximum(top, gl.max(score, 1))
    weight = gl.exp2(score - gl.where(new == float("-inf"), 0.0, new)[:, None])
    narrow = weight.to(weights[SIDE].dtype)
    weights[SIDE].index(0).store(narrow)
    tops[SIDE].index(0).store(new)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready[SIDE])
    shrink = _shrink(top, new)
    return narrow, shrink, new, total * shrink + gl.sum(weight, 1)


@gluon.jit
def _add_own(narrow, shrink, keys, empty, step, value, free, SIDE: gl.constexpr):
    """Add a tile of this side, and free it if ``free``."""
    values: gl.constexpr = value.type.layout
    value = value * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
    columns = keys.index(3 * SIDE + zero(step))
    value = warpgroup_mma(gl.convert_layout(narrow, gl.DotOperandLayout(0, values, 2)), columns, value, is_async=True)
    value = warpgroup_mma_wait(0, deps=(value,))
    _free(empty, SIDE, SIDE, free)
    return value


@gluon.jit
def _add_others(weights, tops, keys, ready, step, value, total, top, SIDE: gl.constexpr):
    """Start to add a tile of the other side, whose maximum is the new one."""
    by_head: gl.constexpr = top.type.layout
    mbarrier.wait(ready[1 - SIDE], step % 2)
    new = tops[1 - SIDE].index(0).load(by_head)
    shrink = _shrink(top, new)
    value = value * gl.convert_layout(shrink, gl.SliceLayout(1, value.type.layout))[:, None]
    columns = keys.index(2 - SIDE + zero(step))
    value = warpgroup_mma(weights[1 - SIDE].index(zero(step)), columns, value, is_async=True)
    return value, total * shrink, new


@gluon.jit
def _attend(sink, out, lse, scale, memory, notes, signals, tops, sums, sizes, SIDE: gl.constexpr):
    """Four warps: one side."""
    queries, keys, weights = memory
    biases, counts = notes
    arrived, full, empty, ready, summed = signals
    items, s, b, n, g, K, H, ratio, offset = sizes
    BLOCK_H: gl.constexpr = queries.shape[1]
    BLOCK_N: gl.constexpr = keys.shape[1]
    WIDTH: gl.constexpr = keys.shape[2]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    by_head: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    none = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores)
    step, turn = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, batch, first_head = _place(item, items, b, H, BLOCK_H)
        token = row.to(gl.int64) * b + batch
        mine = first_head + gl.arange(0, BLOCK_H, by_head)
        start = gl.load(sink + mine, mine < H, 0.0).to(gl.float32) * LOG2E
        top = start
        total = gl.zeros([BLOCK_H], gl.float32, by_head)
        value = gl.zeros([BLOCK_H, WIDTH], gl.float32, values)
        mbarrier.wait(full[2 * SIDE], step % 2)
        pairs = the_number(counts.index(SIDE))
        mbarrier.wait(arrived, turn % 2)
        if SIDE == LEFT:
            score = _score_half(queries, keys, full, step, none, 0, SIDE)
            score = _score_half(queries, keys, full, step, score, 1, SIDE)
            for _ in range(pairs - 1):
                bias = biases.index(SIDE).load(by_key)
                score = warpgroup_mma_wait(0, deps=(score,))
                narrow, shrink, top, total = _weigh(score, bias, weights, tops, top, total, scale, ready, SIDE)
                value = _add_own(narrow, shrink, keys, empty, step, value, True, SIDE)
                value, total, top = _add_others(weights, tops, keys, ready, step, value, total, top, SIDE)
                step += 1
                value = warpgroup_mma_wait(0, deps=(value,))
                _free(empty, SIDE, RIGHT)
                score = _score_half(queries, keys, full, step, none, 0, SIDE)
                score = _score_half(queries, keys, full, step, score, 1, SIDE)
            bias = biases.index(SIDE).load(by_key)
            score = warpgroup_mma_wait(0, deps=(score,))
            narrow, shrink, top, total = _weigh(score, bias, weights, tops, top, total, scale, ready, SIDE)
            value = _add_own(narrow, shrink, keys, empty, step, value, True, SIDE)
            value, total, top = _add_others(weights, tops, keys, ready, step, value, total, top, SIDE)
            value = warpgroup_mma_wait(0, deps=(value,))
            step += 1
        else:
            for pair in range(pairs):
                score = _score_half(queries, keys, full, step, none, 0, SIDE)
                score = _score_half(queries, keys, full, step, score, 1, SIDE)
                bias = biases.index(SIDE).load(by_key)
                score = warpgroup_mma_wait(0, deps=(score,))
                value, total, top = _add_others(weights, tops, keys, ready, step, value, total, top, SIDE)
                narrow, shrink, top, total = _weigh(score, bias, weights, tops, top, total, scale, ready, SIDE)
                value = warpgroup_mma_wait(0, deps=(value,))
                _free(empty, SIDE, LEFT)
                value = _add_own(narrow, shrink, keys, empty, step, value, pair < pairs - 1, SIDE)
                step += 1

        sums[SIDE].index(0).store(total)
        gl.thread_barrier()
        mbarrier.arrive(summed[SIDE])
        mbarrier.wait(summed[1 - SIDE], turn % 2)
        norm = total + sums[1 - SIDE].index(0).load(by_head) + _shrink(start, top)
        if SIDE == RIGHT:
            gl.store(lse + token * H + mine, top + gl.log2(norm), mine < H)
        inverse = gl.convert_layout(1.0 / norm, gl.SliceLayout(1, values))
        store_heads(out + (token * H + first_head) * (2 * WIDTH) + SIDE * WIDTH, keys.index(2 + SIDE),
                    value * inverse[:, None], H - first_head, 2 * WIDTH)  # by way of what this side has read last
        mbarrier.arrive(empty[2 + SIDE])
        turn += 1


@gluon.jit
def forward(q, kv, compressed, selected, sink, out, lse, s, b, n, g, K, H, D: gl.constexpr, ratio, offset,
            scale, WINDOW: gl.constexpr, FAR: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_H: gl.constexpr,
            BLOCK_N: gl.constexpr):
    """A program: every so many of the items, which are a query and BLOCK_H of its heads each."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [2, BLOCK_H, D // 2], shared)  # in halves of the columns
    keys = gl.allocate_shared_memory(dtype, [4, BLOCK_N, D // 2], shared)  # left, right tile's
    left_weights = gl.allocate_shared_memory(dtype, [1, BLOCK_H, BLOCK_N], shared)
    right_weights = gl.allocate_shared_memory(dtype, [1, BLOCK_H, BLOCK_N], shared)
    biases, counts = numbers(2, BLOCK_N, gl.float32), numbers(2, 1, gl.int32)
    arrived = barrier(2)
    full = barrier(1), barrier(1), barrier(1), barrier(1)  # in the order of keys
    empty = barrier(1), barrier(1), barrier(1), barrier(1)
    ready, summed = (barrier(1), barrier(1)), (barrier(1), barrier(1))
    gl.thread_barrier()
    memory = queries, keys, (left_weights, right_weights)
    notes = biases, counts
    signals = arrived, full, empty, ready, summed
    tops = numbers(1, BLOCK_H, gl.float32), numbers(1, BLOCK_H, gl.float32)  # apart, as they are written at any time
    sums = numbers(1, BLOCK_H, gl.float32), numbers(1, BLOCK_H, gl.float32)
    sizes = s * b * ((H + BLOCK_H - 1) // BLOCK_H), s, b, n, g, K, H, ratio, offset
    tensors = q, kv, compressed, selected
    gl.warp_specialize([
        (_attend, (sink, out, lse, scale, memory, notes, signals, tops, sums, sizes, LEFT)),
        (_attend, (sink, out, lse, scale, memory, notes, signals, tops, sums, sizes, RIGHT)),
        (_gather, (tensors, memory, notes, signals, sizes, LEFT, 0, WINDOW, FAR, BLOCK_K)),
        (_gather, (tensors, memory, notes, signals, sizes, LEFT, 1, WINDOW, FAR, BLOCK_K)),
        (_gather, (tensors, memory, notes, signals, sizes, RIGHT, 0, WINDOW, FAR, BLOCK_K)),
        (_gather, (tensors, memory, notes, signals, sizes, RIGHT, 1, WINDOW, FAR, BLOCK_K)),
    ], [4, 1, 1, 1, 1], [COMPUTE_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS])
