"""The dynamic mapping of a hyper-connection: projections of the streams, their norm, and the three gates."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_sum

hc_project = define(
    "hc_project", "GEMM of the flat streams and the reciprocal norm applied after it", spec="4.2", outputs=("proj", "r")
)
hc_gates = define(
    "hc_gates", "h_pre, h_post and the logits of h_res", spec="4.2", outputs=("h_pre", "h_post", "h_res_logits")
)


@hc_project.variant("paddle", "r = 1 / (|x| / sqrt(nC) + eps), hand-written backward")
@differentiable
def paddle_hc_project(streams: Tensor, weight: Tensor, eps: float):
    """streams [s, b, n*C], weight [m, n*C] -> proj [s, b, m], r [s, b, 1], both in float32 or wider."""
    x = widen(streams).reshape([-1, streams.shape[-1]])
    root = math.sqrt(x.shape[-1])
    proj = paddle.matmul(x, weight, transpose_y=True)
    norm = paddle.sqrt(row_sum(x * x))
    r = 1.0 / (norm / root + eps)
    lead = streams.shape[:-1]

    def backward(dproj, dr):
        dproj, dr = dproj.reshape(proj.shape), dr.reshape(r.shape)
        dnorm = -dr * paddle.square(r) / root
        dx = paddle.matmul(dproj, weight).add_(x * (dnorm / norm).expand(x.shape))
        return dx.reshape(streams.shape).astype(streams.dtype), paddle.matmul(dproj, x, transpose_x=True)

    return (proj.reshape([*lead, -1]), r.reshape([*lead, 1])), backward


@hc_project.variant("plain", "the formula, differentiated by autograd")
def plain_hc_project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = widen(streams)
    norm = paddle.sqrt(paddle.square(x).sum(-1, keepdim=True))
    return paddle.matmul(x, weight, transpose_y=True), 1.0 / (norm / math.sqrt(x.shape[-1]) + eps)


@hc_project.variant("hf", "r = rsqrt(mean(x^2) + eps): eps inside the root, as DeepSeek's and Hugging Face's code")
def hf_hc_project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = widen(streams)
    return paddle.matmul(x, weight, transpose_y=True), paddle.rsqrt(paddle.square(x).mean(-1, keepdim=True) + eps)


@hc_gates.variant("paddle", "elementwise, differentiated by autograd")
def paddle_hc_gates(
    proj: Tensor, r: Tensor, alphas: tuple[Tensor, Tensor, Tensor], bias: Tensor, streams: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """proj [s, b, n*n+2n], r [s, b, 1], alphas three of [1] (pre, post, res), bias [n*n+2n]
    -> h_pre [s, b, n], h_post [s, b, n], logits of h_res [s, b, n, n]."""
    n, lead = streams, proj.shape[:-1]
    widths = [n, n, n * n]
    alpha = paddle.concat([a.expand([w]) for a, w in zip(alphas, widths, strict=True)])
    pre, post, res = paddle.split(proj * r * alpha + bias, widths, -1)
    return F.sigmoid(pre) + eps, F.sigmoid(post) * 2.0, res.reshape([*lead, n, n])
