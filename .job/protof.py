"""Contraction's forward in one kernel: a chunk's projections, then its gated sums, with the streams from the L2 cache.
The weight's three bfloat16 numbers lie side by side in one product of 16 columns."""
import triton
import triton.language as tl
from paddledsv4.kernels.hc_mapping import parts_of


@triton.jit
def _project(x, w, parts, t0, split, each, rows, K, N: tl.constexpr, TERMS: tl.constexpr, TOKENS: tl.constexpr,
             BLOCK: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr):
    t, m, i = t0 + tl.arange(0, TOKENS), tl.arange(0, 16), tl.arange(0, BLOCK)
    total, square = tl.zeros([TOKENS, 16], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    at, first = t.to(tl.int64)[:, None] * K, split * each
    for k in tl.range(first, first + each, BLOCK, num_stages=STAGES):
        inside = (k + i) < K
        v = tl.load(x + at + (k + i)[None, :], (t < rows)[:, None] & inside[None, :], 0.0, eviction_policy=KEEP)
        u = tl.load(w + m[None, :] * K + (k + i)[:, None], inside[:, None] & (m < TERMS * N)[None, :], 0.0)
        total += tl.dot(v, u, input_precision="ieee")
        v = v.to(tl.float32)
        square += v * v
    to = (split.to(tl.int64) * rows + t) * 16
    tl.store(parts + to[:, None] + m[None, :], total, (t < rows)[:, None] & (m < TERMS * N)[None, :])
    tl.store(parts + to + TERMS * N, tl.sum(square, 1), t < rows)


@triton.jit
def _gather(x, parts, base, scale, y, gates, p, q, t0, each, rows, C, eps, N: tl.constexpr, TERMS: tl.constexpr,
            SPLITS: tl.constexpr, WIDE: tl.constexpr, DROP: tl.constexpr):
    n, s, j = tl.arange(0, N), tl.arange(0, SPLITS), tl.arange(0, 4)
    for k in range(each):
        t = t0.to(tl.int64) + k
        real = t < rows
        at = parts + (s.to(tl.int64) * rows + t) * 16
        part = tl.load(at[:, None, None] + j[None, :, None] * N + n[None, None, :], real & (j < TERMS)[None, :, None],
                       0.0, cache_modifier=".cg")
        linear = tl.sum(tl.sum(part, 0), 0)
        size = tl.rsqrt(tl.sum(tl.load(at + TERMS * N, real, 0.0, cache_modifier=".cg"), 0) / (N * C) + eps)
        gate = tl.sigmoid(linear * size * tl.load(scale) + tl.load(base + n)) + eps
        tl.store(p + t * N + n, linear, real)
        tl.store(gates + t * N + n, gate, real)
        tl.store(q + t, size, real)
        for begin in range(0, C, WIDE):
            c = begin + tl.arange(0, WIDE)
            inside = (c < C) & real
            v = tl.load(x + (t * N + n[:, None]) * C + c[None, :], inside[None, :], 0.0).to(tl.float32)
            tl.store(y + t * C + c, tl.sum(v * gate[:, None], 0).to(y.dtype.element_ty), inside, eviction_policy=DROP)


@triton.jit
def _forward(x, w, base, scale, parts, y, gates, p, q, counters, rows, K, C, eps, chunks, chunk, width, before, each,
             N: tl.constexpr, TERMS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
             SPLITS: tl.constexpr, WIDE: tl.constexpr, LAG: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr):
    items = tl.cdiv(chunk, each)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    k, i = ticket // (before + items), ticket % (before + items)
    if i < before:
        if k < chunks:
            _project(x, w, parts, k * chunk + i // SPLITS * TOKENS, i % SPLITS, width, rows, K, N, TERMS, TOKENS, BLOCK,
                     STAGES, KEEP)
            tl.debug_barrier()
            tl.atomic_add(counters + 1 + k, 1, sem="release")
    else:
        k -= LAG
        if k >= 0:
            while tl.atomic_add(counters + 1 + k, 0, sem="acquire") < before:
                pass
            _gather(x, parts, base, scale, y, gates, p, q, k * chunk + (i - before) * each, each, rows, C, eps, N,
                    TERMS, SPLITS, WIDE, DROP)


def forward(carrier, streams, fn, base, scale, eps, chunk=256, TOKENS=64, BLOCK=128, STAGES=3, SPLITS=32, each=2,
            WIDE=2048, LAG=2, warps=4, KEEP="", DROP=""):
    (rows, width), n = streams.shape, fn.shape[0]
    C, terms = width // n, 1 if carrier.dtype(streams) == "float32" else 3
    chunks, before, items = triton.cdiv(rows, chunk), chunk // TOKENS * SPLITS, triton.cdiv(chunk, each)
    def empty(*shape, dtype="float32"):
        return carrier.empty(shape, dtype, streams)
    parts, y = empty(SPLITS, rows, 16), empty(rows, C, dtype=carrier.dtype(streams))
    gates, p, q, counters = empty(rows, n), empty(rows, n), empty(rows), carrier.zeros([chunks + 1], "int32", streams)
    part = triton.cdiv(triton.cdiv(width, SPLITS), BLOCK) * BLOCK
    carrier.launch(_forward, ((chunks + LAG) * (before + items),), streams, parts_of(carrier, fn, streams, n, width),
                   base, scale, parts, y, gates, p, q, counters, rows, width, C, eps, chunks, chunk, part, before, each,
                   N=n, TERMS=terms, TOKENS=TOKENS, BLOCK=BLOCK, STAGES=STAGES, SPLITS=SPLITS, WIDE=WIDE, LAG=LAG,
                   KEEP=KEEP, DROP=DROP, num_warps=warps)
    return y, gates, p, q
