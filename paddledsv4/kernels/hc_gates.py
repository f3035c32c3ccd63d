"""The gates of a hyper-connection's dynamic mapping. Spec section 4.2."""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.hc_mapping import padded

BACKWARD = {"TOKENS": 64, "num_warps": 4}
PROGRAMS, ROWS = 256, 256  # about so many programs, and how many of their parts are added at a time


@triton.jit
def _forward(proj, r, pre, post, res, bias, h_pre, h_post, logits, rows, eps,
             N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, TOKENS: tl.constexpr):
    """proj r alpha + bias; sigmoid + eps, twice the sigmoid, and as it is."""
    t, m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, MP)[None, :]
    inside = (t < rows) & (m < M)
    alpha = tl.where(m < N, tl.load(pre), tl.where(m < 2 * N, tl.load(post), tl.load(res)))
    z = tl.load(proj + t * M + m, inside, 0.0) * tl.load(r + t, t < rows, 0.0) * alpha + tl.load(bias + m, m < M, 0.0)
    gate = tl.sigmoid(z)
    tl.store(h_pre + t * N + m, (gate + eps).to(h_pre.dtype.element_ty), inside & (m < N))
    tl.store(h_post + t * N + m - N, (gate * 2.0).to(h_post.dtype.element_ty), inside & (m >= N) & (m < 2 * N))
    tl.store(logits + t * (N * N) + m - 2 * N, z, inside & (m >= 2 * N))


@triton.jit
def _backward(dh_pre, dh_post, dlogits, proj, r, pre, post, res, bias, dproj, dr, parts, rows, each,
              N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, TOKENS: tl.constexpr):
    """``each`` tokens, and their part of d bias and of d alpha before its sum over gates, [2, MP]."""
    m = tl.arange(0, MP)[None, :]
    alpha = tl.where(m < N, tl.load(pre), tl.where(m < 2 * N, tl.load(post), tl.load(res)))
    shift = tl.load(bias + m, m < M, 0.0)
    dbias, dalpha = tl.zeros([TOKENS, MP], tl.float32), tl.zeros([TOKENS, MP], tl.float32)
    first = tl.program_id(0) * each
    for begin in range(first, first + each, TOKENS):
        t = begin + tl.arange(0, TOKENS)[:, None]
        inside = (t < rows) & (m < M)
        scale, p = tl.load(r + t, t < rows, 0.0), tl.load(proj + t * M + m, inside, 0.0)
        gate = tl.sigmoid(p * scale * alpha + shift)
        slope = gate * (1.0 - gate)
        g = tl.load(dlogits + t * (N * N) + m - 2 * N, inside & (m >= 2 * N), 0.0).to(tl.float32)
        g += tl.load(dh_pre + t * N + m, inside & (m < N), 0.0).to(tl.float32) * slope
        g += tl.load(dh_post + t * N + m - N, inside & (m >= N) & (m < 2 * N), 0.0).to(tl.float32) * 2.0 * slope
        tl.store(dproj + t * M + m, g * scale * alpha, inside)
        tl.store(dr + t, tl.sum(g * p * alpha, 1, keep_dims=True), t < rows)
        dbias += g
        dalpha += g * p * scale
    to = parts + tl.program_id(0) * (2 * MP) + tl.arange(0, MP)
    tl.store(to, tl.sum(dbias, 0))
    tl.store(to + MP, tl.sum(dalpha, 0))


@triton.jit
def _finish(parts, dpre, dpost, dres, dbias, count, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
            ROWS: tl.constexpr):
    m, k = tl.arange(0, MP)[None, :], tl.arange(0, ROWS)[:, None]
    bias, alpha = tl.zeros([ROWS, MP], tl.float32), tl.zeros([ROWS, MP], tl.float32)
    for first in range(0, count, ROWS):
        at = (first + k) * (2 * MP) + m
        bias += tl.load(parts + at, first + k < count, 0.0)
        alpha += tl.load(parts + at + MP, first + k < count, 0.0)
    bias, alpha, m = tl.sum(bias, 0), tl.sum(alpha, 0), tl.arange(0, MP)
    tl.store(dbias + m, bias.to(dbias.dtype.element_ty), m < M)
    tl.store(dpre, tl.sum(tl.where(m < N, alpha, 0.0), 0).to(dpre.dtype.element_ty))
    tl.store(dpost, tl.sum(tl.where((m >= N) & (m < 2 * N), alpha, 0.0), 0).to(dpost.dtype.element_ty))
    tl.store(dres, tl.sum(tl.where((m >= 2 * N) & (m < M), alpha, 0.0), 0).to(dres.dtype.element_ty))


def forward(carrier: Carrier, proj: T, r: T, alphas: tuple[T, T, T], bias: T, n: int, eps: float,
            dtype: str) -> tuple[T, T, T]:
    """proj [rows, n*n + 2n], r [rows, 1], three alphas [1] (pre, post, res), bias [n*n + 2n]
    -> h_pre and h_post [rows, n] in ``dtype``, logits [rows, n*n] in the dtype of proj."""
    rows, columns = proj.shape
    h_pre, h_post = carrier.empty([rows, n], dtype, proj), carrier.empty([rows, n], dtype, proj)
    logits = carrier.empty([rows, n * n], carrier.dtype(proj), proj)
    carrier.launch(_forward, (triton.cdiv(rows, 32),), proj, r, *alphas, bias, h_pre, h_post, logits, rows, eps,
                   N=n, M=columns, MP=padded(columns), TOKENS=32, num_warps=4)
    return h_pre, h_post, logits


def backward(carrier: Carrier, dh_pre: T, dh_post: T, dlogits: T, proj: T, r: T, alphas: tuple[T, T, T],
             bias: T, n: int) -> tuple[T, T, list[T], T]:
    """Gradients of the three outputs -> dproj, dr, those of the alphas, dbias."""
    rows, columns = proj.shape
    wide, tokens = padded(columns), BACKWARD["TOKENS"]
    each = tokens * triton.cdiv(rows, tokens * PROGRAMS)
    count = triton.cdiv(rows, each)
    dproj, dr, dbias = (carrier.empty(x.shape, carrier.dtype(x), x) for x in (proj, r, bias))
    dalphas = [carrier.empty([1], carrier.dtype(a), a) for a in alphas]
    parts = carrier.empty([count, 2 * wide], "float32", proj)
    carrier.launch(_backward, (count,), dh_pre, dh_post, dlogits, proj, r, *alphas, bias, dproj, dr, parts, rows,
                   each, N=n, M=columns, MP=wide, **BACKWARD)
    carrier.launch(_finish, (1,), parts, *dalphas, dbias, count, N=n, M=columns, MP=wide, ROWS=ROWS,
                   num_warps=4)
    return dproj, dr, dalphas, dbias
