"""From what every query adds to each of its keys, the gradient of every key: sums through an inverted index.

No atomics: a key's parts are added in the order of the queries, so the bits are equal from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.attention_keys import ALL, LIST
from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.sums import cast

NEAR = tl.constexpr(0)  # beside ALL and LIST: which keys are summed


@triton.jit
def _place(selected, places, first, rows, s, g, K, BLOCK_K: tl.constexpr):
    """places [b, g, rows]: the slot of an entry in the list of a query, plus one. They hold zeros."""
    row, batch = tl.program_id(0), tl.program_id(1)
    slot = tl.arange(0, BLOCK_K)
    entry = tl.load(selected + (batch * s + first + row).to(tl.int64) * K + slot, slot < K, -1)
    tl.store(places + (batch * g + entry).to(tl.int64) * rows + row, slot + 1, entry >= 0)


@triton.jit
def _invert(places, lists, counts, rows, g, b, slots, NEAR_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """lists [b, g, rows]: the rows of the parts that belong to an entry, one after another; counts [b, g]."""
    entry = tl.program_id(1) * g + tl.program_id(0)
    count = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = tl.load(places + entry.to(tl.int64) * rows + row, row < rows, 0).to(tl.int32)
        chosen = (place > 0).to(tl.int32)
        to = count + tl.cumsum(chosen, 0) - 1
        part = (row * b + tl.program_id(1)) * slots + NEAR_SLOTS + place - 1
        tl.store(lists + entry.to(tl.int64) * rows + to, part, place > 0)
        count += tl.sum(chosen, 0)
    tl.store(counts + entry, count)


@triton.jit
def _column(d, HELD: tl.constexpr):
    """Which column stands at place d of a part. HELD: in the order of a matrix unit, where four lanes hold pairs of 32
    columns in turn and each has written its own eight together."""
    column = d
    if HELD:
        column = d // 32 * 32 + d % 8 // 2 * 8 + d % 32 // 8 * 2 + d % 2
    return column


@triton.jit
def _add(parts, total, lists, counts, first, rows, slots, before, b, g, D, ratio, offset, WHICH: tl.constexpr,
         WINDOW: tl.constexpr, NEAR_SLOTS: tl.constexpr, HELD: tl.constexpr, STEP: tl.constexpr,
         BLOCK: tl.constexpr):
    """Add to a row of ``total`` [.., b, D] the parts of its key. ``before``: keys of kv before the first query."""
    key, batch = tl.program_id(0), tl.program_id(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # the rows of queries, counted within the chunk, that see the key
    if WHICH == LIST:
        low, high = 0, tl.load(counts + batch * g + key)
    elif WHICH == ALL:
        low, high = tl.maximum((key + 1) * ratio - 1 - offset - first, 0), rows
    else:
        key += first + before - WINDOW + 1  # the keys of the chunk's queries
        low, high = tl.maximum(key - before - first, 0), tl.minimum(key - before - first + WINDOW, rows)
    value = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(low, high, STEP):
        i = start + tl.arange(0, STEP)
        if WHICH == LIST:
            part = tl.load(lists + (batch * g + key).to(tl.int64) * rows + i, i < high, 0)
        elif WHICH == ALL:
            part = (i * b + batch) * slots + NEAR_SLOTS + key
        else:
            part = (i * b + batch) * slots + WINDOW - 1 - (first + i + before - key)
        inside = (i[:, None] < high) & (d[None, :] < D)
        value += tl.load(parts + part[:, None].to(tl.int64) * D + d[None, :], inside, 0.0).to(tl.float32)
    if key >= 0 and low < high:
        to = total + (key.to(tl.int64) * b + batch) * D + _column(d, HELD)
        tl.store(to, tl.load(to, d < D) + tl.sum(value, 0), d < D)


ADD = {"STEP": 16, "BLOCK": 512, "num_warps": 4}


class KeyGradients:
    """The gradients of kv [n, b, D] and of the compressed entries [g, b, D], in float32 until they are complete.

    A query's parts stand in ``slots``: those of its window and then one per index or per entry, both rounded up to
    whole tiles of ``tile``. ``held``: their columns stand in the order of ``_column``.
    """

    def __init__(self, carrier: Carrier, query: T, kv: T, compressed: T | None, selected: T | None, window: int,
                 ratio: int, offset: int, tile: int, held: bool = False):
        self.carrier, self.kv, self.compressed, self.selected = carrier, kv, compressed, selected
        self.window, self.ratio, self.offset, self.held = window, ratio, offset, held
        self.s, self.b, _, self.d = query.shape
        self.groups = 0 if compressed is None else compressed.shape[0]
        self.near = triton.cdiv(window, tile) * tile
        self.slots = self.near + triton.cdiv(self.groups if selected is None else selected.shape[2], tile) * tile
        self.dkv = carrier.zeros(kv.shape, "float32", kv)
        self.dcompressed = None if compressed is None else carrier.zeros(compressed.shape, "float32", compressed)
        self.lists, self.counts = kv, kv

    def index(self, first: int, rows: int) -> None:
        """Make the inverted index of the queries from ``first`` on."""
        if self.selected is None:
            return
        shape, width = [self.b, self.groups, rows], self.selected.shape[2]
        places = self.carrier.zeros(shape, "int16", self.kv)
        self.lists = self.carrier.empty(shape, "int32", self.kv)
        self.counts = self.carrier.empty(shape[:2], "int32", self.kv)
        self.carrier.launch(_place, (rows, self.b), self.selected, places, first, rows, self.s, self.groups, width,
                            BLOCK_K=triton.next_power_of_2(width), num_warps=4)
        block = min(triton.next_power_of_2(rows), 1024)
        self.carrier.launch(_invert, (self.groups, self.b), places, self.lists, self.counts, rows, self.groups, self.b,
                            self.slots, NEAR_SLOTS=self.near, BLOCK=block, num_warps=4)

    def add(self, parts: T, first: int, rows: int) -> None:
        """Add ``parts`` [rows, b, slots, D] of the queries from ``first`` on."""
        self._add(parts, self.dkv, rows + self.window - 1, first, rows, NEAR.value)
        if self.compressed is not None:
            self._add(parts, self.dcompressed, self.groups, first, rows, (ALL if self.selected is None else LIST).value)

    def _add(self, parts: T, total: T, keys: int, first: int, rows: int, which: int) -> None:
        block = min(triton.next_power_of_2(self.d), ADD["BLOCK"])
        self.carrier.launch(
            _add, (keys, self.b, triton.cdiv(self.d, block)), parts, total, self.lists, self.counts, first, rows,
            self.slots, self.kv.shape[0] - self.s, self.b, self.groups, self.d, self.ratio, self.offset,
            WHICH=which, WINDOW=self.window, NEAR_SLOTS=self.near, HELD=self.held, **ADD | {"BLOCK": block},
        )

    def results(self) -> tuple[T, T | None]:
        """The gradients, in the dtypes of what they belong to."""
        mine = ((self.dkv, self.kv), (self.dcompressed, self.compressed))
        return tuple(None if x is None else cast(self.carrier, x, self.carrier.dtype(like)) for x, like in mine)
