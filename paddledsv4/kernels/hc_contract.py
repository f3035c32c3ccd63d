"""The contraction head of a hyper-connection: a gated sum of the streams. Spec section 4.5.

gate = sigmoid(p q scale + base) + eps with p = x fn^T and q = rsqrt(mean(x^2) + eps). A program reads its tokens twice,
for the gates and for the sum: the second time from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.hc_mapping import streams_backward
from paddledsv4.kernels.reduction import add_parts

FORWARD = {"TOKENS": 8, "BLOCK": 256, "num_warps": 4}


@triton.jit
def _forward(x, fn, base, scale, y, gate, p, q, rows, C, eps, N: tl.constexpr, TOKENS: tl.constexpr,
             BLOCK: tl.constexpr):
    t, n, K = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, N), N * C
    at = t.to(tl.int64)[:, None] * K
    product, square = tl.zeros([TOKENS, N, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(x + at + i[None, :], (t < rows)[:, None] & (i < K)[None, :], 0.0).to(tl.float32)
        f = tl.load(fn + n[:, None] * K + i[None, :], (i < K)[None, :], 0.0)
        product += v[:, None, :] * f[None, :, :]
        square += v * v
    linear, size = tl.sum(product, 2), tl.rsqrt(tl.sum(square, 1) / K + eps)
    h = tl.sigmoid(linear * size[:, None] * tl.load(scale) + tl.load(base + n)[None, :]) + eps
    out = t[:, None] * N + n[None, :]
    tl.store(gate + out, h, (t < rows)[:, None])
    tl.store(p + out, linear, (t < rows)[:, None])
    tl.store(q + t, size, t < rows)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = (t < rows)[:, None] & (c < C)[None, :]
        total = tl.zeros([TOKENS, BLOCK], tl.float32)
        for j in tl.static_range(N):
            v = tl.load(x + at + j * C + c[None, :], inside, 0.0).to(tl.float32)
            total += tl.sum(tl.where(n[None, :] == j, h, 0.0), 1)[:, None] * v
        tl.store(y + t.to(tl.int64)[:, None] * C + c[None, :], total.to(y.dtype.element_ty), inside)


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
def _finish(total, dbase, dscale, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(dbase + n, tl.load(total + n).to(dbase.dtype.element_ty))
    tl.store(dscale, tl.sum(tl.load(total + N + n), 0).to(dscale.dtype.element_ty))


def forward(carrier: Carrier, streams: T, fn: T, base: T, scale: T, eps: float) -> tuple[T, T, T, T]:
    """streams [rows, n*C] contiguous, fn [n, n*C], base [n], scale [1] in float32, n a power of two
    -> hidden [rows, C] and, for ``backward``, gate and p [rows, n], q [rows]."""
    (rows, width), n = streams.shape, fn.shape[0]

    def empty(*shape):
        return carrier.empty(shape, "float32", streams)

    y = carrier.empty([rows, width // n], carrier.dtype(streams), streams)
    gate, p, q = empty(rows, n), empty(rows, n), empty(rows)
    carrier.launch(_forward, (triton.cdiv(rows, FORWARD["TOKENS"]),), streams, fn, base, scale, y, gate, p, q, rows,
                   width // n, eps, N=n, **FORWARD)
    return y, gate, p, q


def backward(carrier: Carrier, dy: T, through: T, streams: T, fn: T, base: T, scale: T, gate: T, p: T, q: T,
             eps: float) -> tuple[T, T, T, T]:
    """dy [rows, C], ``through`` [rows, n*C]: the gradient from whoever goes on -> dstreams, dfn, dbase, dscale."""
    (rows, width), n = streams.shape, fn.shape[0]
    each = triton.cdiv(rows, 1024)
    count = triton.cdiv(rows, each)
    dp, factor, parts = (carrier.empty(shape, "float32", streams) for shape in ([rows, n], [rows], [count, 2 * n]))
    carrier.launch(_gate_backward, (count,), dy, streams, scale, gate, p, q, dp, factor, parts, rows, width // n, eps,
                   each, N=n, BLOCK=1024, num_warps=4)
    dstreams, dfn = streams_backward(carrier, dp, factor, streams, fn, (factor, factor, through, gate, dy), head=True,
                                     count=n)
    dbase, dscale = (carrier.empty(x.shape, carrier.dtype(x), x) for x in (base, scale))
    total = add_parts(carrier, parts, [2 * n], "float32")
    carrier.launch(_finish, (1,), total, dbase, dscale, N=n, num_warps=1)
    return dstreams, dfn, dbase, dscale
