"""Cross entropy of a linear head, loss = log(sum(exp(x W^T))) - (x W^T)[label], without its logits. Spec section 11.

Forward, a tile of logits stays in registers: of each row a base and its sum of exponentials relative to that are
kept, and combined in a second kernel, tile after tile, so that the bits are the same in every run. Backward goes over
blocks of the vocabulary: the gradient of a block's logits is computed once more from x and W, and is then a factor of
dW, which it finishes, and of dx, to which it is added. These are four products of the size of the logits' own; where
the losses' gradient is known beforehand, three are enough (:mod:`paddledsv4.kernels.head_gradients`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import multiprocessors
from paddledsv4.kernels.matmul import config, multiply, place

BLOCK = 1 << 27  # elements of a block of the vocabulary at most: 256 MiB in bfloat16
LOG2E = tl.constexpr(1.4426950408889634)
ABOVE, REACH = tl.constexpr(60.0), tl.constexpr(60.0)  # the base is so much above the label's logit, and logits are
# above the base by no more: exponentials are between e^-60, that of a label which has all the weight, and e^60


@triton.jit
def _logits(x, w, row, column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The tile of x W^T that begins at (row, column), in float32."""
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, C, DEPTH):
        tile = tl.dot(x.load([row, k]), w.load([column, k]).T, tile, input_precision="ieee")
    return tile


@triton.jit
def _label_logits(x, w, labels, picked, start, tokens, C, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """picked = (x W^T)[label], for ``tokens`` tokens from ``start`` on."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = i < tokens
    token, label = (start + i).to(tl.int64)[:, None], tl.load(labels + start + i, inside, 0).to(tl.int64)[:, None]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        here = inside[:, None] & (c < C)
        v = tl.load(x + token * C + c, here, 0.0).to(tl.float32)
        total += v * tl.load(w + label * C + c, here, 0.0).to(tl.float32)
    tl.store(picked + start + i, tl.sum(total, 1), inside)


@triton.jit
def _partials(x, w, e, picked, top, total, e_row, start, tokens, V, C, STORE: tl.constexpr, PROGRAMS: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """Of every row of a tile a base, ``top``, and the sum of exponentials relative to it, for ``tokens`` tokens from
    ``start`` on. The base is the largest logit there.

    STORE: these exponentials, too, to ``e`` [.., tokens], of which ``e_row`` is the first word's row. So that a token
    has the same base everywhere, it is ABOVE the label's logit, unless a logit is out of its REACH.
    """
    rows, columns = tl.cdiv(tokens, ROWS), tl.cdiv(V, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = place(t, rows, columns, GROUP)
        tile = _logits(x, w, start + r * ROWS, c * COLUMNS, C, ROWS, COLUMNS, DEPTH)
        i, j = r * ROWS + tl.arange(0, ROWS), c * COLUMNS + tl.arange(0, COLUMNS)
        tile = tl.where((j < V)[None, :], tile, -float("inf"))
        base = tl.max(tile, 1)
        if STORE:
            usual = tl.load(picked + start + i, i < tokens, 0.0) + ABOVE
            base = tl.where(base > usual + REACH, base, usual)
        tl.store(top + c.to(tl.int64) * tokens + i, base, i < tokens)
        tile = tl.exp2((tile - base[:, None]) * LOG2E)
        tl.store(total + c.to(tl.int64) * tokens + i, tl.sum(tile, 1), i < tokens)
        if STORE:
            e.store([e_row + c * COLUMNS, r * ROWS], tile.to(e.dtype).T)


@triton.jit
def _combine(top, total, picked, losses, logs, base, start, tokens, parts, STORE: tl.constexpr, TOKENS: tl.constexpr,
             PARTS: tl.constexpr):
    """Parts [parts, tokens] -> log of the whole sum, and losses, from ``start`` on.

    STORE: the one base of a token, too: the usual one, or the log if a tile has another.
    """
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = i < tokens
    largest, sums = tl.full([TOKENS], -float("inf"), tl.float32), tl.zeros([TOKENS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & inside[None, :]
        at = part.to(tl.int64)[:, None] * tokens + i[None, :]
        t = tl.load(top + at, here, -float("inf"))
        higher = tl.maximum(largest, tl.max(t, 0))
        higher = tl.where(inside, higher, 0.0)
        terms = tl.load(total + at, here, 0.0) * tl.exp2((t - higher[None, :]) * LOG2E)
        sums = sums * tl.exp2((largest - higher) * LOG2E) + tl.sum(terms, 0)
        largest = higher
    log = largest + tl.log(tl.where(inside, sums, 1.0))
    tl.store(logs + start + i, log, inside)
    mine = tl.load(picked + start + i, inside, 0.0)
    tl.store(losses + start + i, log - mine, inside)
    if STORE:
        tl.store(base + i, tl.where(largest > mine + ABOVE, log, mine + ABOVE), inside)


@triton.jit
def _gradient(x, w, g, labels, logs, dloss, tokens, first, count, V, C, PROGRAMS: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """g = (softmax - label) dloss of ``count`` of the V columns, from ``first`` on, and zeros up to a whole tile."""
    rows, columns = tl.cdiv(tokens, ROWS), tl.cdiv(count, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = place(t, rows, columns, GROUP)
        tile = _logits(x, w, r * ROWS, first + c * COLUMNS, C, ROWS, COLUMNS, DEPTH)
        i, j = r * ROWS + tl.arange(0, ROWS), first + c * COLUMNS + tl.arange(0, COLUMNS)
        inside = i < tokens
        log, seed = tl.load(logs + i, inside, 0.0), tl.load(dloss + i, inside, 0.0).to(tl.float32)
        label = tl.load(labels + i, inside, -1).to(tl.int32)
        p = tl.exp2((tile - log[:, None]) * LOG2E)
        p = tl.where(label[:, None] == j[None, :], p - 1.0, p) * seed[:, None]
        g.store([r * ROWS, c * COLUMNS], tl.where((j < V)[None, :], p, 0.0).to(g.dtype))


class Losses:
    """The losses of tokens, computed by blocks of at most ``block`` tokens, and what it takes: per token the label's
    logit ``picked`` and the ``logs`` of the sums, [tokens] float32 like the ``losses``; per tile of a block its base,
    ``top``, and its sum, ``total``, [tiles, block].

    x [tokens, C], weight [V, C] of one dtype, labels [tokens] of integers below V; rows have a multiple of 16 bytes.
    """

    def __init__(self, carrier: Carrier, x: T, weight: T, labels: T, block: int):
        self.carrier, self.x, self.weight, self.labels = carrier, x, weight, labels
        self.tile = config(carrier.dtype(x))
        self.parts = triton.cdiv(weight.shape[0], self.tile["COLUMNS"])
        self.top, self.total = (carrier.empty([self.parts, block], "float32", x) for _ in range(2))
        self.picked, self.losses, self.logs = (carrier.empty([x.shape[0]], "float32", x) for _ in range(3))

    def compute(self, start: int, tokens: int, scores: T | None = None, e_row: int = 0, base: T | None = None) -> None:
        """Those of ``tokens`` tokens from ``start`` on. ``scores`` gets their exponentials as [vocabulary, tokens],
        from ``e_row`` on, relative to ``top``, and ``base`` what a token's should be relative to."""
        carrier, x, weight, labels, picked, top = self.carrier, self.x, self.weight, self.labels, self.picked, self.top
        (vocabulary, width), programs, tile, store = weight.shape, multiprocessors(), self.tile, scores is not None
        rows, columns, depth = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"]
        of_x, of_w = carrier.tiles(x, [rows, depth]), carrier.tiles(weight, [columns, depth])
        carrier.launch(_label_logits, (triton.cdiv(tokens, 4),), x, weight, labels, picked, start, tokens, width,
                       TOKENS=4, BLOCK=min(512, triton.next_power_of_2(width)), num_warps=4)
        carrier.launch(_partials, (programs,), of_x, of_w, carrier.tiles(scores, [columns, rows]) if store else of_x,
                       picked, top, self.total, e_row, start, tokens, vocabulary, width, STORE=store,
                       PROGRAMS=programs, **tile | {"GROUP": 16})
        carrier.launch(_combine, (triton.cdiv(tokens, 32),), top, self.total, picked, self.losses, self.logs,
                       base if store else top, start, tokens, self.parts, STORE=store, TOKENS=32, PARTS=64, num_warps=4)


def forward(carrier: Carrier, x: T, weight: T, labels: T) -> tuple[T, T]:
    """x, weight and labels as for :class:`Losses` -> losses and the logarithms of the sums, [tokens] float32 each."""
    found = Losses(carrier, x, weight, labels, x.shape[0])
    found.compute(0, x.shape[0])
    return found.losses, found.logs


def backward(carrier: Carrier, dloss: T, x: T, weight: T, labels: T, logs: T, train: bool = True) -> tuple[T, T | None]:
    """dloss [tokens] and what ``forward`` had and gave -> dx [tokens, C], dW [V, C] in their dtypes; unless it is to
    ``train``, no dW."""
    (tokens, width), vocabulary, dtype, programs = x.shape, weight.shape[0], carrier.dtype(x), multiprocessors()
    tile = config(dtype)
    rows, columns, depth = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"]
    size = min(max(BLOCK // tokens // columns, 1), triton.cdiv(vocabulary, columns)) * columns
    block, sum_dx = carrier.empty([tokens, size], dtype, x), carrier.empty(x.shape, "float32", x)
    dx, dw = carrier.empty(x.shape, dtype, x), carrier.empty(weight.shape, dtype, weight) if train else None
    for first in range(0, vocabulary, size):
        count = min(size, vocabulary - first)
        carrier.launch(_gradient, (programs,), carrier.tiles(x, [rows, depth]), carrier.tiles(weight, [columns, depth]),
                       carrier.tiles(block, [rows, columns]), labels, logs, dloss, tokens, first, count, vocabulary,
                       width, PROGRAMS=programs, **tile)
        if train:
            multiply(carrier, block, x, dw, (count, width, tokens), (0, 0, first), transpose=True)
        multiply(carrier, block, weight, dx, (tokens, width, count), (0, first, 0), total=sum_dx, first=first == 0,
                 last=first + size >= vocabulary)
    return dx, dw
