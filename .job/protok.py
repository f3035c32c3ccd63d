"""Sinkhorn backward in loops that are not unrolled: the factors in memory, a thread's own, loaded an iteration early."""
import triton
import triton.language as tl
from paddledsv4.kernels.sinkhorn import _softmax


@triton.jit
def _backward(dout, logits, dlogits, kept, tokens, eps, ITERATIONS: tl.constexpr, N: tl.constexpr,
              TOKENS: tl.constexpr):
    lane, n = tl.arange(0, TOKENS)[:, None, None], tl.arange(0, N)
    t = tl.program_id(0) * TOKENS + lane
    at = t * (N * N) + n[None, :, None] * N + n[None, None, :]
    inside = t < tokens
    p = _softmax(logits, at, inside, eps)
    m = p + eps
    first = 1.0 / (tl.sum(m, 1, keep_dims=True) + eps)
    m *= first
    STEP: tl.constexpr = 2 * N * TOKENS
    place = tl.program_id(0) * (ITERATIONS - 1) * STEP + lane
    of_row, of_column = place + n[None, :, None] * TOKENS, place + (N + n[None, None, :]) * TOKENS
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


def backward(carrier, dout, logits, iterations, eps):
    tokens, n, _ = logits.shape
    blocks = triton.cdiv(tokens, 32)
    dlogits = carrier.empty(logits.shape, carrier.dtype(logits), logits)
    kept = carrier.empty([blocks, iterations - 1, 2 * n, 32], "float32", logits)
    carrier.launch(_backward, (blocks,), dout, logits, dlogits, kept, tokens, eps, ITERATIONS=iterations, N=n,
                   TOKENS=32, num_warps=1)
    return dlogits
