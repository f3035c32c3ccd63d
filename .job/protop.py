"""The projection whose last program of a token block adds the parts: a launch less."""
import triton
import triton.language as tl
from paddledsv4.kernels import hc_mapping as hm


@triton.jit
def _split(x, parts, counters, count, R, C, RP, CP, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, C] -> parts [TERMS, RP, CP], whose sum over the first index it is; zero counters."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + r.to(tl.int64) * C + c, (r < R) & (c < C), 0.0).to(tl.float32)
    for k in tl.static_range(TERMS):
        part = v.to(parts.dtype.element_ty)
        tl.store(parts + (r + k * RP).to(tl.int64) * CP + c, part, (r < R) & (c < C))
        v -= part.to(tl.float32)
    if tl.program_id(0) == 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(counters + i, 0, i < count)


@triton.jit
def _project(x, w, parts, squares, proj, r, root, counters, rows, K, M, each, eps, COUNT: tl.constexpr,
             TERMS: tl.constexpr, TOKENS: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    t, m, i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, MP), tl.arange(0, BLOCK)
    total, square = tl.zeros([TOKENS, MP], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    first = tl.program_id(1) * each
    at = t.to(tl.int64)[:, None] * K
    for k in tl.range(first, first + each, BLOCK, num_stages=STAGES):
        inside = (k + i) < K
        v = tl.load(x + at + (k + i)[None, :], (t < rows)[:, None] & inside[None, :], 0.0)
        part = tl.zeros([TOKENS, MP], tl.float32)
        for term in tl.static_range(TERMS):
            tile = tl.load(w + (term * MP + m)[None, :] * K + (k + i)[:, None], inside[:, None] & (m < M)[None, :], 0.0)
            part = tl.dot(v, tile, part, input_precision="ieee")
        total += part
        v = v.to(tl.float32)
        square += v * v
    real = (t < rows)[:, None] & (m < M)[None, :]
    to = tl.program_id(1).to(tl.int64) * rows + t
    tl.store(parts + to[:, None] * M + m[None, :], total, real)
    tl.store(squares + to, tl.sum(square, 1), t < rows)
    tl.debug_barrier()
    if tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == COUNT - 1:
        for sub in range(0, TOKENS, 32):
            u = tl.program_id(0) * TOKENS + sub + tl.arange(0, 32)
            inside, row = (u < rows)[:, None] & (m < M)[None, :], u.to(tl.int64)
            sums, norm = tl.zeros([32, MP], tl.float32), tl.zeros([32], tl.float32)
            for _ in tl.static_range(COUNT):  # so that no load waits for another
                sums += tl.load(parts + row[:, None] * M + m[None, :], inside, 0.0, cache_modifier=".cg")
                norm += tl.load(squares + row, u < rows, 0.0, cache_modifier=".cg")
                row += rows
            tl.store(proj + u[:, None] * M + m[None, :], sums, inside)
            size = tl.sqrt(norm / K)
            tl.store(root + u, size, u < rows)
            tl.store(r + u, 1.0 / (size + eps), u < rows)


def project(carrier, streams, weight, eps):
    (rows, width), (columns, _) = streams.shape, weight.shape
    tile, blocks = hm.FORWARD, triton.cdiv(rows, hm.FORWARD["TOKENS"])
    splits = min(triton.next_power_of_2(triton.cdiv(hm.PROGRAMS[0], blocks)), triton.cdiv(width, 1024))
    each = triton.cdiv(triton.cdiv(width, splits), tile["BLOCK"]) * tile["BLOCK"]
    count, wide, terms = triton.cdiv(width, each), hm.padded(columns), hm._terms(carrier, streams)

    def empty(*shape, dtype="float32"):
        return carrier.empty(shape, dtype, streams)

    parts, squares, counters = empty(count, rows, columns), empty(count, rows), empty(blocks, dtype="int32")
    w = empty(terms, wide, width, dtype=carrier.dtype(streams))
    proj, r, root = empty(rows, columns), empty(rows, 1), empty(rows)
    carrier.launch(_split, (columns, triton.cdiv(width, 1024)), weight, w, counters, blocks, columns, width, wide,
                   width, TERMS=terms, ROWS=1, BLOCK=1024, num_warps=4)
    carrier.launch(_project, (blocks, count), streams, w, parts, squares, proj, r, root, counters, rows, width, columns,
                   each, eps, COUNT=count, TERMS=terms, MP=wide, **tile)
    return proj, r, root
