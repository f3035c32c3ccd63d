"""Cross entropy of a linear head, loss = log(sum(exp(x W^T))) - (x W^T)[label], without its logits. Spec section 11.

Forward, a tile of logits stays in registers: of each row its largest number and its sum of exponentials are kept, and
combined in a second kernel, tile after tile, so that the bits are the same in every run. Backward goes over blocks of
the vocabulary: the gradient of a block's logits is computed once more from x and W, and is then a factor of dW, which
it finishes, and of dx, to which it is added. These are four products of the size of the logits' own.

Where the losses' gradient is known beforehand, up to a factor, three are enough: blocks of tokens with the whole
vocabulary keep their exponentials, each relative to the largest logit of its row in its tile, until the sums are known.

A block has at most :data:`BLOCK` elements, and in the second way no more than half of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import multiprocessors

BLOCK = 1 << 27  # elements of a block of the vocabulary: 256 MiB in bfloat16
TOKENS_BLOCK = 1 << 29  # elements of a block of tokens: 1 GiB
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that what they share stays in the cache."""
    width = GROUP * columns
    first = tile // width * GROUP
    size = min(rows - first, GROUP)
    return first + tile % width % size, tile % width // size


@triton.jit
def _logits(x, w, row, column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The tile of x W^T that begins at (row, column), in float32."""
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, C, DEPTH):
        tile = tl.dot(x.load([row, k]), w.load([column, k]).T, tile, input_precision="ieee")
    return tile


@triton.jit
def _partials(x, w, e, labels, top, total, picked, start, tokens, V, C, STORE: tl.constexpr, PROGRAMS: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """Of every row of a tile its maximum and its sum of exponentials; the label's logit, in the tile that has it.

    STORE: also the exponentials, to ``e``. For ``tokens`` tokens from ``start`` on.
    """
    rows, columns = tl.cdiv(tokens, ROWS), tl.cdiv(V, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = _place(t, rows, columns, GROUP)
        tile = _logits(x, w, start + r * ROWS, c * COLUMNS, C, ROWS, COLUMNS, DEPTH)
        i, j = r * ROWS + tl.arange(0, ROWS), c * COLUMNS + tl.arange(0, COLUMNS)
        inside = i < tokens
        label = tl.load(labels + start + i, inside, -1).to(tl.int32)
        mine = tl.sum(tl.where(label[:, None] == j[None, :], tile, 0.0), 1)
        tl.store(picked + start + i, mine, inside & (label >= c * COLUMNS) & (label < (c + 1) * COLUMNS))
        tile = tl.where((j < V)[None, :], tile, -float("inf"))
        largest = tl.max(tile, 1)
        tl.store(top + c.to(tl.int64) * tokens + i, largest, inside)
        tile = tl.exp2((tile - largest[:, None]) * LOG2E)
        tl.store(total + c.to(tl.int64) * tokens + i, tl.sum(tile, 1), inside)
        if STORE:
            e.store([r * ROWS, c * COLUMNS], tile.to(e.dtype))


@triton.jit
def _combine(top, total, picked, losses, logs, start, tokens, parts, TOKENS: tl.constexpr, PARTS: tl.constexpr):
    """Parts [parts, tokens] -> log of the whole sum, and losses, from ``start`` on."""
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
    tl.store(losses + start + i, log - tl.load(picked + start + i, inside, 0.0), inside)


@triton.jit
def _gradient(x, w, g, labels, logs, dloss, tokens, first, count, V, C, PROGRAMS: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """g = (softmax - label) dloss of ``count`` of the V columns, from ``first`` on, and zeros up to a whole tile."""
    rows, columns = tl.cdiv(tokens, ROWS), tl.cdiv(count, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = _place(t, rows, columns, GROUP)
        tile = _logits(x, w, r * ROWS, first + c * COLUMNS, C, ROWS, COLUMNS, DEPTH)
        i, j = r * ROWS + tl.arange(0, ROWS), first + c * COLUMNS + tl.arange(0, COLUMNS)
        inside = i < tokens
        log, seed = tl.load(logs + i, inside, 0.0), tl.load(dloss + i, inside, 0.0).to(tl.float32)
        label = tl.load(labels + i, inside, -1).to(tl.int32)
        p = tl.exp2((tile - log[:, None]) * LOG2E)
        p = tl.where(label[:, None] == j[None, :], p - 1.0, p) * seed[:, None]
        g.store([r * ROWS, c * COLUMNS], tl.where((j < V)[None, :], p, 0.0).to(g.dtype))


@triton.jit
def _dw(g, x, dw, tokens, first, count, C, PROGRAMS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """``count`` rows of dW, from ``first`` on: g^T x."""
    rows, columns = tl.cdiv(count, ROWS), tl.cdiv(C, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = _place(t, rows, columns, GROUP)
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, tokens, DEPTH):
            tile = tl.dot(g.load([k, r * ROWS]).T, x.load([k, c * COLUMNS]), tile, input_precision="ieee")
        dw.store([first + r * ROWS, c * COLUMNS], tile.to(dw.dtype))


@triton.jit
def _product(a, b, out, total, M, N, K, b_row, out_row, TRANSPOSE: tl.constexpr, FIRST: tl.constexpr,
             LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """a b, or a^T b, with K rows of b from ``b_row`` on: added to ``total`` unless it is the FIRST addend, and with the
    LAST one to ``out``, from ``out_row`` on.

    A program a tile: a persistent one would load ``total`` ahead, for which there is no room beside a and b.
    """
    r, c = _place(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        if TRANSPOSE:
            left = a.load([k, r * ROWS]).T
        else:
            left = a.load([r * ROWS, k])
        tile = tl.dot(left, b.load([b_row + k, c * COLUMNS]), tile, input_precision="ieee")
    i, j = r * ROWS + tl.arange(0, ROWS), c * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < M)[:, None] & (j < N)[None, :]
    at = i.to(tl.int64)[:, None] * N + j[None, :]
    if not FIRST:
        tile += tl.load(total + at, inside, 0.0)
    if LAST:
        out.store([out_row + r * ROWS, c * COLUMNS], tile.to(out.dtype))
    else:
        tl.store(total + at, tile, inside)


@triton.jit
def _spread(e, top, labels, picked, logs, dloss, start, tokens, V, ROW, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """Exponentials of TILES tiles of a row -> (softmax - label) dloss, in place."""
    i, first = tl.program_id(0), tl.program_id(1) * TILES
    log, seed = tl.load(logs + start + i), tl.load(dloss + start + i).to(tl.float32)
    label = tl.load(labels + start + i).to(tl.int32)
    at_label = (tl.exp2((tl.load(picked + start + i) - log) * LOG2E) - 1.0) * seed
    c = first + tl.arange(0, TILES)
    factor = tl.exp2((tl.load(top + c.to(tl.int64) * tokens + i, c * COLUMNS < V, -float("inf")) - log) * LOG2E) * seed
    j = c[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = e + i.to(tl.int64) * ROW + j
    g = tl.load(at, j < V, 0.0).to(tl.float32) * factor[:, None]
    tl.store(at, tl.where(j == label, at_label, g).to(e.dtype.element_ty), j < V)


def _config(dtype: str) -> dict[str, int]:
    """Tiles for the matrix units' bfloat16; float32 is multiplied as it is, without them."""
    if dtype == "bfloat16":
        return {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}


def forward(carrier: Carrier, x: T, weight: T, labels: T) -> tuple[T, T]:
    """x [tokens, C], weight [V, C] of one dtype, labels [tokens] of integers below V -> losses and the logarithms of
    the sums, [tokens] float32 each. Rows have a multiple of 16 bytes."""
    parts = triton.cdiv(weight.shape[0], _config(carrier.dtype(x))["COLUMNS"])
    top, total = (carrier.empty([parts, x.shape[0]], "float32", x) for _ in range(2))
    picked, losses, logs = (carrier.empty([x.shape[0]], "float32", x) for _ in range(3))
    _losses(carrier, x, weight, labels, None, top, total, picked, losses, logs, 0, x.shape[0])
    return losses, logs


def _losses(carrier: Carrier, x: T, weight: T, labels: T, block: T | None, top: T, total: T, picked: T, losses: T,
            logs: T, start: int, tokens: int) -> None:
    """Losses and logs of ``tokens`` tokens from ``start`` on; ``block`` gets their exponentials."""
    (vocabulary, width), programs, config = weight.shape, multiprocessors(), _config(carrier.dtype(x))
    rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
    of_x, of_w = carrier.tiles(x, [rows, depth]), carrier.tiles(weight, [columns, depth])
    store = block is not None
    carrier.launch(_partials, (programs,), of_x, of_w, carrier.tiles(block, [rows, columns]) if store else of_x, labels,
                   top, total, picked, start, tokens, vocabulary, width, STORE=store, PROGRAMS=programs, **config)
    carrier.launch(_combine, (triton.cdiv(tokens, 32),), top, total, picked, losses, logs, start, tokens,
                   triton.cdiv(vocabulary, columns), TOKENS=32, PARTS=64, num_warps=4)


def backward(carrier: Carrier, dloss: T, x: T, weight: T, labels: T, logs: T, train: bool = True) -> tuple[T, T | None]:
    """dloss [tokens] and what ``forward`` had and gave -> dx [tokens, C], dW [V, C] in their dtypes; unless it is to
    ``train``, no dW."""
    (tokens, width), vocabulary, dtype, programs = x.shape, weight.shape[0], carrier.dtype(x), multiprocessors()
    config = _config(dtype)
    rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
    size = min(max(BLOCK // tokens // columns, 1), triton.cdiv(vocabulary, columns)) * columns
    block, sum_dx = carrier.empty([tokens, size], dtype, x), carrier.empty(x.shape, "float32", x)
    dx, dw = carrier.empty(x.shape, dtype, x), carrier.empty(weight.shape, dtype, weight) if train else None
    for first in range(0, vocabulary, size):
        count = min(size, vocabulary - first)
        carrier.launch(_gradient, (programs,), carrier.tiles(x, [rows, depth]), carrier.tiles(weight, [columns, depth]),
                       carrier.tiles(block, [rows, columns]), labels, logs, dloss, tokens, first, count, vocabulary,
                       width, PROGRAMS=programs, **config)
        if train:
            carrier.launch(_dw, (programs,), carrier.tiles(block, [depth, rows]), carrier.tiles(x, [depth, columns]),
                           carrier.tiles(dw, [rows, columns]), tokens, first, count, width, PROGRAMS=programs, **config)
        carrier.launch(_product, (triton.cdiv(tokens, rows) * triton.cdiv(width, columns),),
                       carrier.tiles(block, [rows, depth]), carrier.tiles(weight, [depth, columns]),
                       carrier.tiles(dx, [rows, columns]), sum_dx, tokens, width, count, first, 0, TRANSPOSE=False,
                       FIRST=first == 0, LAST=first + size >= vocabulary, **config)
    return dx, dw


def losses_and_gradients(
    carrier: Carrier, x: T, weight: T, labels: T, dloss: T, train: bool = True
) -> tuple[T, T, T | None]:
    """As ``forward`` and ``backward`` in one -> losses, dx, dW."""
    (tokens, width), vocabulary, dtype = x.shape, weight.shape[0], carrier.dtype(x)
    config = _config(dtype)
    rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
    parts = triton.cdiv(vocabulary, columns)
    size = max(min(TOKENS_BLOCK // vocabulary, triton.cdiv(tokens, 2)) // rows, 1) * rows
    block = carrier.empty([size, parts * columns], dtype, x)
    top, total = (carrier.empty([parts, size], "float32", x) for _ in range(2))
    picked, losses, logs = (carrier.empty([tokens], "float32", x) for _ in range(3))
    dx, dw = carrier.empty(x.shape, dtype, x), carrier.empty(weight.shape, dtype, weight) if train else None
    sum_dw = carrier.empty(weight.shape if train and tokens > size else [1], "float32", weight)
    for start in range(0, tokens, size):
        count, last = min(size, tokens - start), start + size >= tokens
        _losses(carrier, x, weight, labels, block, top, total, picked, losses, logs, start, count)
        carrier.launch(_spread, (count, triton.cdiv(parts, 16)), block, top, labels, picked, logs, dloss, start, count,
                       vocabulary, parts * columns, COLUMNS=columns, TILES=16, num_warps=4)
        carrier.launch(_product, (triton.cdiv(count, rows) * triton.cdiv(width, columns),),
                       carrier.tiles(block, [rows, depth]), carrier.tiles(weight, [depth, columns]),
                       carrier.tiles(dx, [rows, columns]), sum_dw, count, width, vocabulary, 0, start,
                       TRANSPOSE=False, FIRST=True, LAST=True, **config)
        if not train:
            continue
        carrier.launch(_product, (triton.cdiv(vocabulary, rows) * triton.cdiv(width, columns),),
                       carrier.tiles(block, [depth, rows]), carrier.tiles(x, [depth, columns]),
                       carrier.tiles(dw, [rows, columns]), sum_dw, vocabulary, width, count, start, 0,
                       TRANSPOSE=True, FIRST=start == 0, LAST=last, **config)
    return losses, dx, dw
