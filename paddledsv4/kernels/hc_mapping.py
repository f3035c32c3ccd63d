"""The projections of a hyper-connection's dynamic mapping, with the row norm in one pass. Spec section 4.2.

The streams are bfloat16, the weight float32, and the product is to be as good as float32: the weight, and in backward
the projections' gradient, are cut into three bfloat16 numbers each whose sum they are, so that every product on the
tensor cores is exact. (Two for the gradient are faster, but each number is then off by up to 2^-17 of itself, and dw by
2.4e-6 instead of 4e-8.) float32 streams are multiplied without them. A tensor core rounds toward zero as it adds, so
that the error grows with the length of a sum: products are added there within a tile only, tiles in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.reduction import add_parts

TERMS = 3  # bfloat16 numbers for a float32 one
FORWARD = {"TOKENS": 128, "BLOCK": 64, "STAGES": 4, "num_warps": 8}
BACKWARD = {"TOKENS": 64, "BLOCK": 128, "STAGES": 3, "num_warps": 4}
HEAD_FORWARD = {"TOKENS": 64, "BLOCK": 128, "STAGES": 4, "num_warps": 4}
HEAD_BACKWARD = {"TOKENS": 32, "BLOCK": 128, "STAGES": 3, "num_warps": 4}  # which reads two tiles more
PROGRAMS = 256, 256  # at least so many programs, forward and backward, for few tokens


@triton.jit
def _cut(v, to, step, inside, TERMS: tl.constexpr):
    """Stores v, float32, as TERMS numbers whose sum it is: at the pointers ``to``, and each next ``step`` further."""
    for _ in tl.static_range(TERMS):
        part = v.to(to.dtype.element_ty)
        tl.store(to, part, inside)
        v -= part.to(tl.float32)
        to += step


@triton.jit
def _split(x, parts, R, C, RP, CP, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, C] -> parts [TERMS, RP, CP], whose sum over the first index it is; zeros where x has nothing."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + r.to(tl.int64) * C + c, (r < R) & (c < C), 0.0).to(tl.float32)
    _cut(v, parts + r.to(tl.int64) * CP + c, RP * CP, (r < RP) & (c < CP), TERMS)


@triton.jit
def _project(x, w, proj, squares, rows, K, M, each, TERMS: tl.constexpr, TOKENS: tl.constexpr, MP: tl.constexpr,
             BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The part of x w^T, and of the sum of squares, over ``each`` of the K features; w as parts [TERMS, MP, K]."""
    t, m, i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, MP), tl.arange(0, BLOCK)
    total, square = tl.zeros([TOKENS, MP], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    first = tl.program_id(1) * each
    at = t.to(tl.int64)[:, None] * K
    for k in tl.range(first, first + each, BLOCK, num_stages=STAGES):
        inside = (k + i) < K
        v = tl.load(x + at + (k + i)[None, :], (t < rows)[:, None] & inside[None, :], 0.0)
        part = tl.zeros([TOKENS, MP], tl.float32)
        for term in tl.static_range(TERMS):
            u = tl.load(w + (term * MP + m)[None, :] * K + (k + i)[:, None], inside[:, None], 0.0)
            part = tl.dot(v, u, part, input_precision="ieee")
        total += part
        v = v.to(tl.float32)
        square += v * v
    to = tl.program_id(1).to(tl.int64) * rows + t
    tl.store(proj + to[:, None] * M + m[None, :], total, (t < rows)[:, None] & (m < M)[None, :])
    tl.store(squares + to, tl.sum(square, 1), t < rows)


@triton.jit
def _finish(parts, squares, proj, r, root, rows, K, M, eps, COUNT: tl.constexpr, TOKENS: tl.constexpr,
            MP: tl.constexpr):
    """Adds the parts. root = |x| / sqrt(K), r = 1 / (root + eps)."""
    t, m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, MP)
    inside, at = (t < rows)[:, None] & (m < M)[None, :], t.to(tl.int64)
    total, square = tl.zeros([TOKENS, MP], tl.float32), tl.zeros([TOKENS], tl.float32)
    for _ in tl.static_range(COUNT):  # so that no load waits for another
        total += tl.load(parts + at[:, None] * M + m[None, :], inside, 0.0)
        square += tl.load(squares + at, t < rows, 0.0)
        at += rows
    tl.store(proj + t[:, None] * M + m[None, :], total, inside)
    size = tl.sqrt(square / K)
    tl.store(root + t, size, t < rows)
    tl.store(r + t, 1.0 / (size + eps), t < rows)


@triton.jit
def _split_rows(d, dr, r, root, parts, factor, rows, M, K, TERMS: tl.constexpr, TOKENS: tl.constexpr,
                MP: tl.constexpr):
    """``_split`` of d [rows, M], and the factor of x in dx: d root = -dr r^2, d x = x d root / (K root); none where x
    is zero."""
    t, m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, MP)[None, :]
    v = tl.load(d + t[:, None] * M + m, (t < rows)[:, None] & (m < M), 0.0).to(tl.float32)
    scale, size = tl.load(r + t, t < rows, 0.0), tl.load(root + t, t < rows, 0.0)
    droot = -tl.load(dr + t, t < rows, 0.0).to(tl.float32) * scale * scale
    tl.store(factor + t, tl.where(size > 0.0, droot / (K * tl.where(size > 0.0, size, 1.0)), 0.0), t < rows)
    _cut(v, parts + t.to(tl.int64)[:, None] * MP + m, rows * MP, (t < rows)[:, None], TERMS)


@triton.jit
def _project_backward(x, w, d, factor, through, gate, dy, dx, parts, rows, C, M, each, HEAD: tl.constexpr,
                      TERMS: tl.constexpr, TOKENS: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
                      STAGES: tl.constexpr):
    """BLOCK features of one stream of dx for ``each`` tokens, and their part of dw; d as parts [TERMS, rows, MP].

    dx = d w + x factor. Of the head, dx has two terms more: ``through``, and the stream's gate times dy. The product
    with w is to about 16 bits for bfloat16 streams, the one for dw exact before its sum.
    """
    blocks = tl.cdiv(C, BLOCK)
    stream, c = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    streams = tl.num_programs(0) // blocks
    K, m, n = streams * C, tl.arange(0, MP), tl.arange(0, TOKENS)
    i = stream * C + c
    weight = tl.load(w + m[:, None] * K + i[None, :], (m < M)[:, None] & (c < C)[None, :], 0.0)
    upper = weight.to(x.dtype.element_ty)
    lower = (weight - upper.to(tl.float32)).to(x.dtype.element_ty)
    dw = tl.zeros([BLOCK, MP], tl.float32)
    first = tl.program_id(1) * each
    for begin in tl.range(first, first + each, TOKENS, num_stages=STAGES):
        t = begin + n
        row = t.to(tl.int64)[:, None]
        inside = (t < rows)[:, None] & (c < C)[None, :]
        v = tl.load(x + row * K + i[None, :], inside, 0.0)
        g = v.to(tl.float32) * tl.load(factor + t, t < rows, 0.0)[:, None]
        if HEAD:
            g += tl.load(through + row * K + i[None, :], inside, 0.0).to(tl.float32)
            h = tl.load(gate + t * streams + stream, t < rows, 0.0)
            g += h[:, None] * tl.load(dy + row * C + c[None, :], inside, 0.0).to(tl.float32)
        turned, sums = tl.trans(v), tl.zeros([BLOCK, MP], tl.float32)
        for term in tl.static_range(TERMS):
            part = tl.load(d + (row + term * rows) * MP + m[None, :], (t < rows)[:, None], 0.0)
            if term < 2:
                g = tl.dot(part, upper, g, input_precision="ieee")
            if term == 0 and TERMS > 1:
                g = tl.dot(part, lower, g)
            sums = tl.dot(turned, part, sums, input_precision="ieee")
        dw += sums
        tl.store(dx + row * K + i[None, :], g.to(dx.dtype.element_ty), inside)
    to = tl.program_id(1).to(tl.int64) * M
    tl.store(parts + (to + m)[None, :] * K + i[:, None], dw, (m < M)[None, :] & (c < C)[:, None])


def padded(count: int) -> int:
    """A power of two that holds them; tensor cores want 16."""
    return max(16, triton.next_power_of_2(count))


def _empty_parts(carrier: Carrier, streams: T, rows: int, columns: int) -> T:
    """[terms, rows, columns] in the dtype of the streams, of which so many terms make a float32 number."""
    dtype = carrier.dtype(streams)
    return carrier.empty([1 if dtype == "float32" else TERMS, rows, columns], dtype, streams)


def parts_of(carrier: Carrier, x: T, streams: T, rows: int, columns: int) -> T:
    """x, padded with zeros, in the dtype of the streams as [terms, rows, columns]."""
    parts = _empty_parts(carrier, streams, rows, columns)
    block = min(1024, triton.next_power_of_2(columns))
    tile = max(1, 1024 // block)
    carrier.launch(_split, (triton.cdiv(rows, tile), triton.cdiv(columns, block)), x, parts, *x.shape, rows, columns,
                   TERMS=parts.shape[0], ROWS=tile, BLOCK=block, num_warps=4)
    return parts


def project(carrier: Carrier, streams: T, weight: T, eps: float, tile: dict | None = None) -> tuple[T, T, T]:
    """streams [rows, K] contiguous, weight [M, K] float32 -> proj [rows, M], r [rows, 1] and, for ``backward``,
    root [rows], all float32. ``tile``: FORWARD unless given."""
    (rows, width), (columns, _) = streams.shape, weight.shape
    tile = tile or FORWARD
    blocks = triton.cdiv(rows, tile["TOKENS"])
    splits = min(triton.next_power_of_2(triton.cdiv(PROGRAMS[0], blocks)), triton.cdiv(width, 1024))
    each = triton.cdiv(triton.cdiv(width, splits), tile["BLOCK"]) * tile["BLOCK"]
    count, wide = triton.cdiv(width, each), padded(columns)

    def empty(*shape):
        return carrier.empty(shape, "float32", streams)

    parts, squares = empty(count, rows, columns), empty(count, rows)
    proj, r, root = empty(rows, columns), empty(rows, 1), empty(rows)
    weights = parts_of(carrier, weight, streams, wide, width)
    carrier.launch(_project, (blocks, count), streams, weights, parts, squares, rows, width, columns, each,
                   TERMS=weights.shape[0], MP=wide, **tile)
    carrier.launch(_finish, (triton.cdiv(rows, 32),), parts, squares, proj, r, root, rows, width, columns, eps,
                   COUNT=count, TOKENS=32, MP=wide, num_warps=4)
    return proj, r, root


def streams_backward(carrier: Carrier, d: T, factor: T, streams: T, weight: T, others: tuple[T, T, T] | None = None,
                     count: int = 1) -> tuple[T, T]:
    """``_project_backward`` over ``count`` streams, d [terms, rows, MP]; ``others``, of the head: through, gate, dy
    -> dstreams, dweight."""
    (rows, width), (columns, _) = streams.shape, weight.shape
    tile = HEAD_BACKWARD if others else BACKWARD
    blocks = count * triton.cdiv(width // count, tile["BLOCK"])
    splits = max(1, min(triton.cdiv(PROGRAMS[1], blocks), triton.cdiv(rows, 4 * tile["TOKENS"])))
    each = triton.cdiv(triton.cdiv(rows, splits), tile["TOKENS"]) * tile["TOKENS"]
    dstreams = carrier.empty(streams.shape, carrier.dtype(streams), streams)
    parts = carrier.empty([triton.cdiv(rows, each), columns, width], "float32", streams)
    carrier.launch(_project_backward, (blocks, parts.shape[0]), streams, weight, d, factor,
                   *(others or (factor, factor, factor)), dstreams, parts, rows, width // count, columns, each,
                   HEAD=others is not None, TERMS=d.shape[0], MP=d.shape[2], **tile)
    return dstreams, add_parts(carrier, parts, [columns, width], carrier.dtype(weight))


def project_backward(carrier: Carrier, dproj: T, dr: T, streams: T, weight: T, r: T, root: T) -> tuple[T, T]:
    """dproj [rows, M], dr [rows, 1] -> dstreams in the dtype of the streams, dweight float32."""
    (rows, width), columns = streams.shape, weight.shape[0]
    factor, d = carrier.empty([rows], "float32", streams), _empty_parts(carrier, streams, rows, padded(columns))
    carrier.launch(_split_rows, (triton.cdiv(rows, 32),), dproj, dr, r, root, d, factor, rows, columns, width,
                   TERMS=d.shape[0], TOKENS=32, MP=d.shape[2], num_warps=4)
    return streams_backward(carrier, d, factor, streams, weight)
