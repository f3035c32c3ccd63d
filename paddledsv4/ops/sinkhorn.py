"""Sinkhorn normalisation of the residual mixing matrix: rows and columns in turn, ending on columns."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

sinkhorn = define("sinkhorn", "logits to a doubly stochastic mixing matrix", spec="4.3", outputs=("h_res",))


def _sum_matrices(n: int, dtype) -> tuple[Tensor, Tensor]:
    """[n*n, n*n] matrices that replace each entry of a flat n x n matrix by its row sum, or its column sum."""
    eye, ones = paddle.eye(n, dtype=dtype), paddle.ones([n, n], dtype=dtype)
    return paddle.kron(eye, ones), paddle.kron(ones, eye)


@sinkhorn.variant("paddle", "matrix entries by tokens, sums as GEMMs, normalisations kept for a hand-written backward")
@differentiable
def paddle_sinkhorn(logits: Tensor, iterations: int, eps: float, dtype: str):
    """logits [..., n, n] (last dimension: columns) -> [..., n, n] in ``dtype``; eps is added to entries and sums."""
    n = logits.shape[-1]
    row_sum, column_sum = _sum_matrices(n, logits.dtype)
    sums = [column_sum] + [row_sum, column_sum] * (iterations - 1)
    probability = F.softmax(logits, -1)
    m, kept = probability.reshape([-1, n * n]).t() + eps, []
    for total in sums:
        denominator = paddle.matmul(total, m) + eps
        m = m / denominator
        kept.append((m, denominator))

    def backward(dout):
        g = dout.astype(logits.dtype).reshape([-1, n * n]).t()
        for total, (m, denominator) in zip(reversed(sums), reversed(kept), strict=True):
            g = (g - paddle.matmul(total, g * m)) / denominator
        g = g.t().reshape(logits.shape)
        return ((g - (g * probability).sum(-1, keepdim=True)) * probability,)

    return m.t().reshape(logits.shape).astype(dtype), backward


@sinkhorn.variant("plain", "the loop as written, differentiated by autograd")
def plain_sinkhorn(logits: Tensor, iterations: int, eps: float, dtype: str) -> Tensor:
    m = F.softmax(logits, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m.astype(dtype)


@megatron_order(sinkhorn, "the loop as written; its gradient comes from a transposed use, and is summed in that layout")
def megatron_sinkhorn(K, logits, iterations, eps, dtype):
    m = K.softmax(logits, -1) + eps
    m = m / (K.sum(m, -2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (K.sum(m, -1, keepdim=True) + eps)
        m = m / (K.sum(m, -2, keepdim=True) + eps)
    return K.transposed_gradient(K.cast(m, dtype))
