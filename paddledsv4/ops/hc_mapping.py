"""The dynamic mapping of a hyper-connection: projections of the streams, their norm, and the three gates."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_sum

hc_project = define(
    "hc_project", "GEMM of the flat streams and the reciprocal norm applied after it", spec="4.2",
    outputs=("proj", "r"), wide=("proj", "r"),
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
    proj: Tensor, r: Tensor, alpha_pre: Tensor, alpha_post: Tensor, alpha_res: Tensor, bias: Tensor,
    streams: int, eps: float, dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """proj [s, b, n*n+2n], r [s, b, 1], alphas [1], bias [n*n+2n]
    -> h_pre [s, b, n] and h_post [s, b, n] in ``dtype``, logits of h_res [s, b, n, n]."""
    n, lead = streams, proj.shape[:-1]
    widths = [n, n, n * n]
    alpha = paddle.concat([a.expand([w]) for a, w in zip((alpha_pre, alpha_post, alpha_res), widths, strict=True)])
    pre, post, res = paddle.split(proj * r * alpha + bias, widths, -1)
    h_pre, h_post = F.sigmoid(pre) + eps, F.sigmoid(post) * 2.0
    return h_pre.astype(dtype), h_post.astype(dtype), res.reshape([*lead, n, n])


@megatron_order(hc_project, "GEMM, norm of the flat row, r = 1 / (norm / sqrt(nC) + eps)")
def megatron_hc_project(K, streams, weight, eps):
    s, b, width = streams.shape
    x = K.wide(streams.reshape([s * b, width]))
    proj = K.matmul(x, K.permute(weight, 1, 0))
    r = 1.0 / (K.norm(x, -1, keepdim=True) / math.sqrt(width) + eps)
    return proj.reshape([s, b, -1]), r.reshape([s, b, 1])


@megatron_order(hc_gates, "((r proj) alpha) + bias, sliced; gates cast to the dtype of the streams")
def megatron_hc_gates(K, proj, r, alpha_pre, alpha_post, alpha_res, bias, streams, eps, dtype):
    n, (s, b, _) = streams, proj.shape
    alpha = K.cat([alpha_pre.expand([n]), alpha_post.expand([n]), alpha_res.expand([n * n])], -1)
    h = K.scale_rows(K.scale_rows(proj, r), alpha) + bias
    h_pre = K.sigmoid(h[..., :n]) + eps
    h_post = K.sigmoid(h[..., n : 2 * n]) * 2
    return K.cast(h_pre, dtype), K.cast(h_post, dtype), h[..., 2 * n :].reshape([s, b, n, n])
