"""The key segments of sparse attention. A query sees several; one softmax runs over all of them.

Each segment serves a chunk of query rows ``[r0, r1)`` and has the same methods:

* ``products(q)``: q [b, rows, H, D] -> inner products [b, rows, H, keys of the segment]
* ``scores(q)``: the same with NEVER added where a query may not look
* ``weigh(p)``: probabilities of that shape -> [b, rows, H, D]
* ``gradient(p, ds, q, dout)``: gradient of the scores' and of the weighing's inputs; returns dq, adds to ``dkeys``
* ``cut(r0, r1)``: the segment for these rows; chunks share ``dkeys``
* ``numbers_per_row(H)``: how many numbers a query row makes

Nowhere are more than rows x selected x D numbers held. Masks are expanded before they are added: Paddle's CPU
broadcast over a middle dimension is ten times slower than expand and add.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.ops.precision import dtype_name

NEVER = -1e30  # added to a score it gives a weight of exactly zero


@functools.lru_cache(maxsize=16)
def _band_mask(blocks: int, window: int, missing: int, dtype: str) -> Tensor:
    """[blocks, window, 1, 2*window]: query i of a block sees keys (i, i+window] of its two blocks of keys.

    The first ``missing`` keys of the first block lie before the sequence.
    """
    i, j = np.arange(window)[:, None], np.arange(2 * window)[None, :]
    mask = np.where((j > i) & (j <= i + window), 0.0, NEVER)
    mask = np.broadcast_to(mask, (blocks, window, 2 * window)).copy()
    mask[0, :, :missing] = NEVER
    return paddle.to_tensor(mask[:, :, None, :], dtype=dtype)


class Window:
    """The last ``window`` keys of every query, itself included, as a band of key blocks.

    kv [b, window + rows, D]: the keys of the ``window`` positions before the first query, then of the queries'
    own; the first ``missing`` lie before the sequence. The number of rows and the chunks are multiples of ``window``.
    """

    def __init__(
        self, kv: Tensor, window: int, missing: int, rows: tuple[int, int] | None = None, dkeys: Tensor | None = None
    ):
        self.kv, self.window, self.missing = kv, window, missing
        self.rows = rows or (0, kv.shape[1] - window)
        self.dkeys = dkeys

    def cut(self, r0: int, r1: int) -> Window:
        return Window(self.kv, self.window, self.missing, (r0, r1), self.dkeys)

    def numbers_per_row(self, heads: int) -> int:
        return heads * 2 * self.window

    def begin_gradient(self) -> None:
        self.dkeys = paddle.zeros_like(self.kv)

    def _band(self) -> Tensor:
        """[b, blocks, 2*window, D]: every block of keys behind the one before it."""
        (r0, r1), w = self.rows, self.window
        b, _, d = self.kv.shape
        own, previous = (self.kv[:, r0 + shift : r1 + shift].reshape([b, -1, w, d]) for shift in (w, 0))
        return paddle.concat([previous, own], 2)

    def _blocks(self, x: Tensor) -> Tensor:
        """[b, rows, H, n] -> [b, blocks, window*H, n]"""
        return x.reshape([x.shape[0], -1, self.window * x.shape[2], x.shape[3]])

    def products(self, q: Tensor) -> Tensor:
        return paddle.matmul(self._blocks(q), self._band(), transpose_y=True).reshape([*q.shape[:3], -1])

    def scores(self, q: Tensor) -> Tensor:
        b, rows, heads, _ = q.shape
        w = self.window
        mask = _band_mask(rows // w, w, 0 if self.rows[0] else self.missing, dtype_name(q))
        banded = self.products(q).reshape([b, -1, w, heads, 2 * w])
        return (banded + mask.expand(banded.shape[1:])).reshape([b, rows, heads, 2 * w])

    def weigh(self, p: Tensor) -> Tensor:
        return paddle.matmul(self._blocks(p), self._band()).reshape([*p.shape[:3], -1])

    def gradient(self, p: Tensor, ds: Tensor, q: Tensor, dout: Tensor) -> Tensor:
        (r0, r1), w = self.rows, self.window
        b, _, d = self.kv.shape
        ds_blocks = self._blocks(ds)
        dband = paddle.matmul(ds_blocks, self._blocks(q), transpose_x=True)
        dband += paddle.matmul(self._blocks(p), self._blocks(dout), transpose_x=True)
        self.dkeys[:, r0 + w : r1 + w] += dband[:, :, w:].reshape([b, r1 - r0, d])
        self.dkeys[:, r0:r1] += dband[:, :, :w].reshape([b, r1 - r0, d])
        return paddle.matmul(ds_blocks, self._band()).reshape(q.shape)


@functools.lru_cache(maxsize=16)
def causal_mask(first: int, last: int, groups: int, ratio: int, dtype: str) -> Tensor:
    """[last - first, groups]: 0 where compressed entry c is complete at position i, c < (i+1) // ratio, else NEVER."""
    i, c = np.arange(first, last)[:, None], np.arange(groups)[None, :]
    return paddle.to_tensor(np.where(c < (i + 1) // ratio, 0.0, NEVER), dtype=dtype)


class Compressed:
    """All complete compressed entries of every query (ratio 128). keys [b, g, D]; row 0 is position ``offset``."""

    def __init__(
        self, keys: Tensor, ratio: int, offset: int, rows: tuple[int, int] | None = None, dkeys: Tensor | None = None
    ):
        self.keys, self.ratio, self.offset, self.rows, self.dkeys = keys, ratio, offset, rows, dkeys

    def cut(self, r0: int, r1: int) -> Compressed:
        return Compressed(self.keys, self.ratio, self.offset, (r0, r1), self.dkeys)

    def numbers_per_row(self, heads: int) -> int:
        return heads * self.keys.shape[1]

    def begin_gradient(self) -> None:
        self.dkeys = paddle.zeros_like(self.keys)

    def products(self, q: Tensor) -> Tensor:
        b, rows, heads, d = q.shape
        s = paddle.matmul(q.reshape([b, rows * heads, d]), self.keys, transpose_y=True)
        return s.reshape([b, rows, heads, -1])

    def scores(self, q: Tensor) -> Tensor:
        products = self.products(q)
        first, last = (self.offset + row for row in self.rows)
        mask = causal_mask(first, last, self.keys.shape[1], self.ratio, dtype_name(q))
        return products + mask.unsqueeze(1).expand(products.shape[1:])

    def weigh(self, p: Tensor) -> Tensor:
        b, rows, heads, g = p.shape
        return paddle.matmul(p.reshape([b, rows * heads, g]), self.keys).reshape([b, rows, heads, -1])

    def gradient(self, p: Tensor, ds: Tensor, q: Tensor, dout: Tensor) -> Tensor:
        b, rows, heads, d = q.shape
        fold = [b, rows * heads, -1]
        ds, p = ds.reshape(fold), p.reshape(fold)
        self.dkeys.add_(paddle.matmul(ds, q.reshape(fold), transpose_x=True))
        self.dkeys.add_(paddle.matmul(p, dout.reshape(fold), transpose_x=True))
        return paddle.matmul(ds, self.keys).reshape(q.shape)


class Selected:
    """The compressed entries that an index list names for every query (ratio 4).

    keys [b, g, D], index [b, s, K] with -1 for no entry: it weighs zero and gets no gradient. What it reads is a row
    of zeros, put before the keys: were it one of them, a NaN there would reach every query, zero times NaN being NaN.
    """

    def __init__(self, keys: Tensor, index: Tensor):
        self.index, self.padded = index, paddle.concat([paddle.zeros_like(keys[:, :1]), keys], 1)
        self.dpadded = None

    def cut(self, r0: int, r1: int) -> Selected:
        part = copy.copy(self)
        part.index = self.index[:, r0:r1]
        return part

    def numbers_per_row(self, heads: int) -> int:
        return self.index.shape[-1] * self.padded.shape[-1]

    def begin_gradient(self) -> None:
        self.dpadded = paddle.zeros_like(self.padded)

    @property
    def dkeys(self) -> Tensor:
        return self.dpadded[:, 1:]

    def _flat_index(self) -> Tensor:
        b, rows, _ = self.padded.shape
        base = paddle.arange(b, dtype=self.index.dtype).reshape([b, 1, 1]) * rows
        return (self.index + 1 + base).reshape([-1])

    def _gathered(self) -> Tensor:
        rows = paddle.gather(self.padded.reshape([-1, self.padded.shape[-1]]), self._flat_index())
        return rows.reshape([*self.index.shape, self.padded.shape[-1]])

    def products(self, q: Tensor) -> Tensor:
        return paddle.matmul(q, self._gathered(), transpose_y=True)

    def scores(self, q: Tensor) -> Tensor:
        products = self.products(q)
        return products + ((self.index < 0).astype(q.dtype) * NEVER).unsqueeze(2).expand(products.shape)

    def weigh(self, p: Tensor) -> Tensor:
        return paddle.matmul(p, self._gathered())

    def gradient(self, p: Tensor, ds: Tensor, q: Tensor, dout: Tensor) -> Tensor:
        d = self.padded.shape[-1]
        dgathered = paddle.matmul(ds, q, transpose_x=True) + paddle.matmul(p, dout, transpose_x=True)
        flat = self.dpadded.reshape([-1, d])
        total = paddle.index_add(flat, self._flat_index(), 0, dgathered.reshape([-1, d]))
        paddle.assign(total.reshape(self.dpadded.shape), self.dpadded)
        return paddle.matmul(ds, self._gathered())
