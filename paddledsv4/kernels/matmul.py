"""Products of large matrices for the head: persistent programs, tiles by tensor descriptors, sums in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import multiprocessors


@triton.jit
def place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that what they share stays in the cache."""
    width = GROUP * columns
    first = tile // width * GROUP
    size = min(rows - first, GROUP)
    return first + tile % width % size, tile % width // size


@triton.jit
def _halves(tile):
    """Its left and its right columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(piece, out, total, factor, row, column, M, N, out_row, FIRST: tl.constexpr, LAST: tl.constexpr,
            SCALE: tl.constexpr):
    """A piece of a product: its rows times ``factor``, added to ``total`` unless it is the FIRST addend, and with the
    LAST one to ``out``."""
    i, j = row + tl.arange(0, piece.shape[0]), column + tl.arange(0, piece.shape[1])
    inside = (i < M)[:, None] & (j < N)[None, :]
    at = (out_row + i).to(tl.int64)[:, None] * N + j[None, :]
    if SCALE:
        piece *= tl.load(factor + out_row + i, i < M, 0.0)[:, None]
    if not FIRST:
        piece += tl.load(total + at, inside, 0.0)
    if LAST:
        out.store([out_row + row, column], piece.to(out.dtype))
    else:
        tl.store(total + at, piece, inside)


@triton.jit
def _finish_halves(tile, out, total, factor, row, column, M, N, out_row, FIRST: tl.constexpr, LAST: tl.constexpr,
                   SCALE: tl.constexpr):
    """Its left and its right columns, each a piece."""
    left, right = _halves(tile)
    _finish(left, out, total, factor, row, column, M, N, out_row, FIRST, LAST, SCALE)
    _finish(right, out, total, factor, row, column + tile.shape[1] // 2, M, N, out_row, FIRST, LAST, SCALE)


@triton.jit
def _product(a, b, out, total, factor, M, N, K, a_row, b_row, out_row, TRANSPOSE: tl.constexpr, FIRST: tl.constexpr,
             LAST: tl.constexpr, SCALE: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """a b, or a^T b, with rows of a, b and the result from ``a_row``, ``b_row`` and ``out_row`` on; for the rest see
    ``_finish``. A tile is finished in pieces: whole, it would not fit beside the next tile's a and b."""
    total = total.to(tl.pointer_type(tl.float32))  # whatever is else kept in that memory
    rows, columns = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        r, c = place(t, rows, columns, GROUP)
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            if TRANSPOSE:
                left = a.load([a_row + k, r * ROWS]).T
            else:
                left = a.load([a_row + r * ROWS, k])
            tile = tl.dot(left, b.load([b_row + k, c * COLUMNS]), tile, input_precision="ieee")
        row, column = r * ROWS, c * COLUMNS
        if FIRST and LAST:
            _finish_halves(tile, out, total, factor, row, column, M, N, out_row, FIRST, LAST, SCALE)
        else:
            left, right = _halves(tile)
            _finish_halves(left, out, total, factor, row, column, M, N, out_row, FIRST, LAST, SCALE)
            _finish_halves(right, out, total, factor, row, column + COLUMNS // 2, M, N, out_row, FIRST, LAST, SCALE)


def config(dtype: str) -> dict[str, int]:
    """Tiles for the matrix units' bfloat16; float32 is multiplied as it is, without them."""
    if dtype == "bfloat16":
        return {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}


def multiply(carrier: Carrier, a: T, b: T, out: T, sizes: tuple[int, int, int], at: tuple[int, int, int],
             transpose: bool = False, total: T | None = None, first: bool = True, last: bool = True,
             factor: T | None = None, group: int = 8) -> None:
    """out = a b, or a^T b, where M, N, K of it are ``sizes``, and its rows begin in a, b and out ``at`` those; a and b
    read as zeros beyond their ends. Rows times ``factor`` [M], float32, if it is given.

    A sum of several products: into ``total``, memory for float32 [.., N], from the ``first`` on, and with the ``last``
    into out. Both may be the memory of a where no row is written that is still to be read. ``group`` rows of tiles are
    multiplied with all columns before the next ones are.
    """
    tile, programs = config(carrier.dtype(a)), multiprocessors()
    rows, columns, depth = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"]
    of_a = carrier.tiles(a, [depth, rows] if transpose else [rows, depth])
    of_out = carrier.tiles(out, [rows, columns // (2 if first and last else 4)])
    total, scale = b if total is None else total, factor is not None
    carrier.launch(_product, (programs,), of_a, carrier.tiles(b, [depth, columns]), of_out, total,
                   factor if scale else total, *sizes, *at, TRANSPOSE=transpose, FIRST=first, LAST=last, SCALE=scale,
                   PROGRAMS=programs, **tile | {"GROUP": group})
