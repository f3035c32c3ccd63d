"""RMS normalisation over the last dimension: y = x / sqrt(mean(x^2) + eps) * w."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import column_sum, row_mean

rms_norm = define("rms_norm", "RMS normalisation with a weight", spec="0")
head_norm = define("head_norm", "RMS normalisation of each query head, without a weight", spec="5.1")


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = paddle.rsqrt(row_mean(x * x) + eps).expand(x.shape)
    return x * r, r


def _plain_normalise(x: Tensor, eps: float) -> Tensor:
    return x * paddle.rsqrt(paddle.square(x).mean(-1, keepdim=True) + eps)


def _normalise_backward(g: Tensor, u: Tensor, r: Tensor) -> Tensor:
    """Gradient of u = x r(x): r (g - u mean(g u))."""
    return (g - u * row_mean(g * u).expand(u.shape)) * r


@rms_norm.variant("paddle", "in float32 or wider, hand-written backward")
@differentiable
def paddle_rms_norm(x: Tensor, weight: Tensor, eps: float):
    """x [..., L], weight [L] -> [..., L] in the dtype of x."""
    u, r = _normalise(widen(x), eps)

    def backward(dy):
        dy = widen(dy)
        dx = _normalise_backward(dy * weight.expand(u.shape), u, r)
        return dx.astype(x.dtype), column_sum(dy * u).astype(weight.dtype)

    return (u * weight.expand(u.shape)).astype(x.dtype), backward


@rms_norm.variant("plain", "the formula, differentiated by autograd")
def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_plain_normalise(widen(x), eps) * weight).astype(x.dtype)


@head_norm.variant("paddle", "in float32 or wider, hand-written backward")
@differentiable
def paddle_head_norm(x: Tensor, eps: float):
    """x [..., D] -> [..., D] in the dtype of x."""
    u, r = _normalise(widen(x), eps)
    return u.astype(x.dtype), lambda dy: (_normalise_backward(widen(dy), u, r).astype(x.dtype),)


@head_norm.variant("plain", "the formula, differentiated by autograd")
def plain_head_norm(x: Tensor, eps: float) -> Tensor:
    return _plain_normalise(widen(x), eps).astype(x.dtype)


@megatron_order(rms_norm, "((x r) w) in float32, cast once at the end",
                same_bits="Paddle's kernels add in torch's order")
def megatron_rms_norm(K, x, weight, eps):
    return K.rms_norm(x, weight, eps)


@megatron_order(head_norm, "square, mean, rsqrt and product each in the dtype of x",
                same_bits="Paddle's kernels add in torch's order")
def megatron_head_norm(K, x, eps):
    return K.scale_rows(x, K.rsqrt(K.mean(K.square(x), -1, keepdim=True) + eps))
