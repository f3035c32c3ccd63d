"""The contraction head of a hyper-connection: a gated sum of the streams. Spec section 4.5.

gate = sigmoid(p q scale + base) + eps with p = x fn^T and q = rsqrt(mean(x^2) + eps): the mapping's projection, then
the aggregate. So the streams are read twice, which bounds forward by 56 % of a copy's rate and backward by 72 %.
Kernels that took their tokens from the L2 cache the second time were no faster: one read fn for every few tokens, in
one the programs of the second half waited for those of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.hc_mapping import HEAD_FORWARD, padded, parts_of, project, streams_backward
from paddledsv4.kernels.hc_mix import aggregate
from paddledsv4.kernels.reduction import add_parts


@triton.jit
def _gate(p, root, base, scale, gate, q, rows, eps, N: tl.constexpr, TOKENS: tl.constexpr):
    t, n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, N)
    size = tl.load(root + t, t < rows, 1.0)
    size = tl.rsqrt(size * size + eps)
    at = t[:, None] * N + n[None, :]
    z = tl.load(p + at, (t < rows)[:, None], 0.0) * size[:, None] * tl.load(scale) + tl.load(base + n)[None, :]
    tl.store(gate + at, tl.sigmoid(z) + eps, (t < rows)[:, None])
    tl.store(q + t, size, t < rows)


@triton.jit
def _gate_backward(dy, x, scale, gate, p, q, dp, factor, parts, rows, C, eps, each, N: tl.constexpr,
                   BLOCK: tl.constexpr):
    """``each`` tokens: gradients of p, the factor of x in dx that comes from q, parts of d base and of d scale."""
    n = tl.arange(0, N)
    dbase, dscale = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    first = tl.program_id(0).to(tl.int64) * each
    for k in range(tl.minimum(each, rows - first)):
        t = first + k
        dgate = tl.zeros([N, BLOCK // 8], tl.float32)
        for begin in range(0, C, BLOCK):
            c = begin + tl.arange(0, BLOCK)[None, :]
            v = tl.load(x + (t * N + n[:, None]) * C + c, c < C, 0.0).to(tl.float32)
            g = tl.load(dy + t * C + c, c < C, 0.0).to(tl.float32)
            dgate += tl.sum(tl.reshape(v * g, [N, BLOCK // 8, 8]), 2)
        sigma, size, linear = tl.load(gate + t * N + n) - eps, tl.load(q + t), tl.load(p + t * N + n)
        dz = tl.sum(dgate, 1) * sigma * (1.0 - sigma)
        dbase += dz
        dscale += dz * linear * size
        dz *= tl.load(scale)
        tl.store(dp + t * N + n, dz * size)
        tl.store(factor + t, -size * size * size * tl.sum(dz * linear, 0) / (N * C))
    tl.store(parts + tl.program_id(0) * (2 * N) + n, dbase)
    tl.store(parts + tl.program_id(0) * (2 * N) + N + n, dscale)


@triton.jit
def _gate_finish(total, dbase, dscale, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(dbase + n, tl.load(total + n).to(dbase.dtype.element_ty))
    tl.store(dscale, tl.sum(tl.load(total + N + n), 0).to(dscale.dtype.element_ty))


def forward(carrier: Carrier, streams: T, fn: T, base: T, scale: T, eps: float) -> tuple[T, T, T, T]:
    """streams [rows, n*C] contiguous, fn [n, n*C], base [n], scale [1] in float32, n a power of two
    -> hidden [rows, C] and, for ``backward``, gate and p [rows, n], q [rows]."""
    rows, n = streams.shape[0], fn.shape[0]
    p, _, root = project(carrier, streams, fn, eps, HEAD_FORWARD)
    gate, q = carrier.empty([rows, n], "float32", streams), carrier.empty([rows], "float32", streams)
    carrier.launch(_gate, (triton.cdiv(rows, 128),), p, root, base, scale, gate, q, rows, eps, N=n, TOKENS=128,
                   num_warps=4)
    return aggregate(carrier, streams, gate), gate, p, q


def backward(carrier: Carrier, dy: T, through: T, streams: T, fn: T, base: T, scale: T, gate: T, p: T, q: T,
             eps: float) -> tuple[T, T, T, T]:
    """dy [rows, C], ``through`` [rows, n*C]: the gradient from whoever goes on -> dstreams, dfn, dbase, dscale."""
    (rows, width), n = streams.shape, fn.shape[0]
    each = triton.cdiv(rows, 1024)
    count = triton.cdiv(rows, each)
    dp, factor, parts = (carrier.empty(shape, "float32", streams) for shape in ([rows, n], [rows], [count, 2 * n]))
    carrier.launch(_gate_backward, (count,), dy, streams, scale, gate, p, q, dp, factor, parts, rows, width // n, eps,
                   each, N=n, BLOCK=1024, num_warps=4)
    d = parts_of(carrier, dp, streams, rows, padded(n))
    dstreams, dfn = streams_backward(carrier, d, factor, streams, fn, (through, gate, dy), count=n)
    dbase, dscale = (carrier.empty(x.shape, carrier.dtype(x), x) for x in (base, scale))
    total = add_parts(carrier, parts, [2 * n], "float32")
    carrier.launch(_gate_finish, (1,), total, dbase, dscale, N=n, num_warps=1)
    return dstreams, dfn, dbase, dscale
