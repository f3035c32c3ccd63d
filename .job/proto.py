"""Contraction's backward in one kernel: chunks of tokens, first the gates' gradients, then the streams', which finds
the chunk's streams in the L2 cache. Programs take tickets, and wait for earlier tickets only."""
import triton
import triton.language as tl
from paddledsv4.kernels.hc_contract import _gate_finish
from paddledsv4.kernels.reduction import add_parts


@triton.jit
def _gates_of(dy, x, scale, gate, p, q, d, factor, parts, index, t0, rows, C, eps, each, N: tl.constexpr,
              MP: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr, KEEP: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, MP)
    dbase, dscale = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for k in range(each):
        t = t0.to(tl.int64) + k
        dgate = tl.zeros([N, BLOCK // 8], tl.float32)
        real = t < rows
        for begin in range(0, C, BLOCK):
            c = begin + tl.arange(0, BLOCK)[None, :]
            v = tl.load(x + (t * N + n[:, None]) * C + c, (c < C) & real, 0.0, eviction_policy=KEEP).to(tl.float32)
            g = tl.load(dy + t * C + c, (c < C) & real, 0.0, eviction_policy=KEEP).to(tl.float32)
            dgate += tl.sum(tl.reshape(v * g, [N, BLOCK // 8, 8]), 2)
        sigma, size = tl.load(gate + t * N + n, real, 0.0) - eps, tl.load(q + t, real, 0.0)
        linear = tl.load(p + t * N + n, real, 0.0)
        dz = tl.where(real, tl.sum(dgate, 1) * sigma * (1.0 - sigma), 0.0)
        dbase += dz
        dscale += dz * linear * size
        dz *= tl.load(scale)
        tl.store(factor + t, -size * size * size * tl.sum(dz * linear, 0) / (N * C), real)
        v = tl.sum(tl.where(m[:, None] == n[None, :], (dz * size)[None, :], 0.0), 1)
        for term in tl.static_range(TERMS):
            part = v.to(d.dtype.element_ty)
            tl.store(d + (t + term * rows) * MP + m, part, real)
            v -= part.to(tl.float32)
    tl.store(parts + index * (2 * N) + n, dbase)
    tl.store(parts + index * (2 * N) + N + n, dscale)


@triton.jit
def _streams_of(x, w, d, factor, through, gate, dy, dx, parts, item, chunk, first, each, rows, C, M,
                streams: tl.constexpr, TERMS: tl.constexpr, TOKENS: tl.constexpr, MP: tl.constexpr,
                BLOCK: tl.constexpr, STAGES: tl.constexpr, DROP: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK)
    stream, c = item // blocks, item % blocks * BLOCK + tl.arange(0, BLOCK)
    K, m, n = streams * C, tl.arange(0, MP), tl.arange(0, TOKENS)
    i = stream * C + c
    weight = tl.load(w + m[:, None] * K + i[None, :], (m < M)[:, None] & (c < C)[None, :], 0.0)
    upper = weight.to(x.dtype.element_ty)
    lower = (weight - upper.to(tl.float32)).to(x.dtype.element_ty)
    dw = tl.zeros([BLOCK, MP], tl.float32)
    for begin in tl.range(first, first + each, TOKENS, num_stages=STAGES):
        t = begin + n
        row = t.to(tl.int64)[:, None]
        inside = (t < rows)[:, None] & (c < C)[None, :]
        v = tl.load(x + row * K + i[None, :], inside, 0.0)
        g = v.to(tl.float32) * tl.load(factor + t, t < rows, 0.0, cache_modifier=".cg")[:, None]
        g += tl.load(through + row * K + i[None, :], inside, 0.0, eviction_policy=DROP).to(tl.float32)
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
        tl.store(dx + row * K + i[None, :], g.to(dx.dtype.element_ty), inside, eviction_policy=DROP)
    tl.store(parts + (chunk.to(tl.int64) * M + m)[None, :] * K + i[:, None], dw, (m < M)[None, :] & (c < C)[:, None])


@triton.jit
def _backward(dy, x, fn, scale, gate, p, q, through, d, factor, dx, gparts, wparts, counters, rows, C, eps,
              chunks, chunk, each, before, items, N: tl.constexpr, TERMS: tl.constexpr, TOKENS: tl.constexpr,
              MP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, LAG: tl.constexpr,
              KEEP: tl.constexpr, DROP: tl.constexpr):
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    k, i = ticket // (before + items), ticket % (before + items)
    if i < before:
        if k < chunks:
            _gates_of(dy, x, scale, gate, p, q, d, factor, gparts, k * before + i, k * chunk + i * each, rows, C, eps,
                      each, N, MP, WIDE, TERMS, KEEP)
            tl.debug_barrier()
            tl.atomic_add(counters + 1 + k, 1, sem="release")
    else:
        k -= LAG
        if k >= 0:
            while tl.atomic_add(counters + 1 + k, 0, sem="acquire") < before:
                pass
            _streams_of(x, fn, d, factor, through, gate, dy, dx, wparts, i - before, k, k * chunk, chunk, rows, C, N,
                        N, TERMS, TOKENS, MP, BLOCK, STAGES, DROP)


def backward(carrier, dy, through, streams, fn, base, scale, gate, p, q, eps, chunk=256, each=4, TOKENS=32, BLOCK=128,
             STAGES=3, WIDE=2048, LAG=1, warps=4, KEEP="", DROP=""):
    (rows, width), n = streams.shape, fn.shape[0]
    C, dtype = width // n, carrier.dtype(streams)
    chunks, before, items = triton.cdiv(rows, chunk), chunk // each, n * triton.cdiv(C, BLOCK)
    terms = 1 if dtype == "float32" else 3
    d, factor = carrier.empty([terms, rows, 16], dtype, streams), carrier.empty([rows], "float32", streams)
    gparts = carrier.empty([chunks * before, 2 * n], "float32", streams)
    wparts = carrier.empty([chunks, n, width], "float32", streams)
    dx, counters = carrier.empty(streams.shape, dtype, streams), carrier.zeros([chunks + 1], "int32", streams)
    carrier.launch(_backward, ((chunks + LAG) * (before + items),), dy, streams, fn, scale, gate, p, q, through, d,
                   factor, dx, gparts, wparts, counters, rows, C, eps, chunks, chunk, each, before, items, N=n,
                   TERMS=terms, TOKENS=TOKENS, MP=16, BLOCK=BLOCK, STAGES=STAGES, WIDE=WIDE, LAG=LAG, KEEP=KEEP,
                   DROP=DROP, num_warps=warps)
    dfn = add_parts(carrier, wparts, [n, width], carrier.dtype(fn))
    dbase, dscale = (carrier.empty(x.shape, carrier.dtype(x), x) for x in (base, scale))
    total = add_parts(carrier, gparts, [2 * n], "float32")
    carrier.launch(_gate_finish, (1,), total, dbase, dscale, N=n, num_warps=1)
    return dx, dfn, dbase, dscale
