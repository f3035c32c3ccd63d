"""Sinkhorn normalisation of n x n matrices in registers: softmax, then columns and rows in turn. Spec section 4.3.

eps is added to the entries after the softmax, and to every sum. Backward computes the iterations anew and keeps one
over their sums, 2n numbers an iteration; the matrices come back from the last one by dividing by these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

TOKENS = 32  # one token a thread of one warp: its matrix is in the thread's registers


@triton.jit
def _softmax(logits, at, inside, eps):
    """Matrices [TOKENS, N, N] in float32 and the maxima's exponentials over their row sums, without eps."""
    v = tl.load(logits + at, inside, 0.0).to(tl.float32)
    e = tl.exp(v - tl.max(v, 2, keep_dims=True))
    return e * (1.0 / tl.sum(e, 2, keep_dims=True))


@triton.jit
def _forward(logits, out, tokens, eps, ITERATIONS: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    at = t * (N * N) + tl.arange(0, N)[None, :, None] * N + tl.arange(0, N)[None, None, :]
    inside = t < tokens
    m = _softmax(logits, at, inside, eps) + eps
    m *= 1.0 / (tl.sum(m, 1, keep_dims=True) + eps)
    for _ in range(ITERATIONS - 1):
        m *= 1.0 / (tl.sum(m, 2, keep_dims=True) + eps)
        m *= 1.0 / (tl.sum(m, 1, keep_dims=True) + eps)
    tl.store(out + at, m.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(dout, logits, dlogits, kept, tokens, eps, ITERATIONS: tl.constexpr, N: tl.constexpr,
              TOKENS: tl.constexpr):
    """The gradient of m f, f one over the sums of m along an axis: (g - sum(g m f)) f.

    ``kept`` [programs, ITERATIONS - 1, 2N, TOKENS]: f of rows and of columns, which a thread writes for itself and, on
    the way back, loads an iteration early. Loops are not unrolled: their code would take longer to arrive than to run.
    """
    lane, n = tl.arange(0, TOKENS)[:, None, None], tl.arange(0, N)
    t = tl.program_id(0) * TOKENS + lane
    at = t * (N * N) + n[None, :, None] * N + n[None, None, :]
    inside = t < tokens
    p = _softmax(logits, at, inside, eps)
    m = p + eps
    first = 1.0 / (tl.sum(m, 1, keep_dims=True) + eps)
    m *= first
    STEP: tl.constexpr = 2 * N * TOKENS
    start = tl.program_id(0) * (ITERATIONS - 1) * STEP + lane
    of_row, of_column = start + n[None, :, None] * TOKENS, start + (N + n[None, None, :]) * TOKENS
    rows, columns = tl.sum(m, 2, keep_dims=True), tl.sum(m, 1, keep_dims=True)
    for k in tl.range(ITERATIONS - 1, loop_unroll_factor=1):
        rows = 1.0 / (tl.sum(m, 2, keep_dims=True) + eps)
        m *= rows
        columns = 1.0 / (tl.sum(m, 1, keep_dims=True) + eps)
        m *= columns
        tl.store(tl.max_contiguous(kept + (of_row + k * STEP), [1, 1, 1]), rows)
        tl.store(tl.max_contiguous(kept + (of_column + k * STEP), [1, 1, 1]), columns)
    g = tl.load(dout + at, inside, 0.0).to(tl.float32)
    for k in tl.range(ITERATIONS - 1, loop_unroll_factor=1):
        left, more = ITERATIONS - 3 - k, k < ITERATIONS - 2
        next_rows = tl.load(tl.max_contiguous(kept + (of_row + left * STEP), [1, 1, 1]), more, 1.0)
        next_columns = tl.load(tl.max_contiguous(kept + (of_column + left * STEP), [1, 1, 1]), more, 1.0)
        g = (g - tl.sum(g * m, 1, keep_dims=True)) * columns
        m *= 1.0 / columns
        g = (g - tl.sum(g * m, 2, keep_dims=True)) * rows
        m *= 1.0 / rows
        rows, columns = next_rows, next_columns
    g = (g - tl.sum(g * m, 1, keep_dims=True)) * first
    g = (g - tl.sum(g * p, 2, keep_dims=True)) * p
    tl.store(dlogits + at, g.to(dlogits.dtype.element_ty), inside)


def forward(carrier: Carrier, logits: T, iterations: int, eps: float, dtype: str) -> T:
    """logits [tokens, n, n] contiguous, n a power of two -> [tokens, n, n] in ``dtype``."""
    tokens, n, _ = logits.shape
    out = carrier.empty(logits.shape, dtype, logits)
    carrier.launch(_forward, (triton.cdiv(tokens, TOKENS),), logits, out, tokens, eps,
                   ITERATIONS=iterations, N=n, TOKENS=TOKENS, num_warps=1)
    return out


def backward(carrier: Carrier, dout: T, logits: T, iterations: int, eps: float) -> T:
    """dout and logits [tokens, n, n] -> dlogits in the dtype of the logits."""
    tokens, n, _ = logits.shape
    dlogits = carrier.empty(logits.shape, carrier.dtype(logits), logits)
    blocks = triton.cdiv(tokens, TOKENS)
    kept = carrier.empty([blocks, iterations - 1, 2 * n, TOKENS], "float32", logits)
    carrier.launch(_backward, (blocks,), dout, logits, dlogits, kept, tokens, eps,
                   ITERATIONS=iterations, N=n, TOKENS=TOKENS, num_warps=1)
    return dlogits
