"""The arithmetic of one optimizer step: gradient norm, clipping, AdamW. All in place on float32 or wider."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

grad_norm = define("grad_norm", "2-norm over all gradients", spec="13", outputs=("norm",))
adamw = define("adamw", "AdamW with decoupled decay, applied first", spec="13", outputs=())


@grad_norm.variant("paddle", "square root of the sum of squared norms")
def paddle_grad_norm(gradients: list[Tensor]) -> float:
    """The norm as a Python float."""
    squares = [paddle.square(g).sum() for g in gradients]
    return math.sqrt(float(paddle.add_n(squares)))


@adamw.variant("paddle", "elementwise, in place")
def paddle_adamw(
    parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, scale: float,
) -> None:
    """Update parameter, m and v with gradient * scale; ``step`` counts from 1."""
    m.scale_(beta1).add_(gradient * ((1.0 - beta1) * scale))
    v.scale_(beta2).add_(paddle.square(gradient).scale_((1.0 - beta2) * scale**2))
    denominator = paddle.sqrt(v).scale_(1.0 / math.sqrt(1.0 - beta2**step), eps)
    update = paddle.divide(m, denominator).scale_(lr / (1.0 - beta1**step))
    parameter.scale_(1.0 - lr * weight_decay).subtract_(update)


@megatron_order(adamw, "clip, decay, lerp, mul and addcmul, sqrt / sqrt + eps, addcdiv; scalars rounded once",
                explicit=True)
def megatron_adamw(K, parameter, gradient, m, v, step, lr, beta1, beta2, eps, weight_decay, scale):
    g = gradient * scale if scale < 1.0 else gradient
    K.adamw_(parameter, g, m, v, step, lr, beta1, beta2, eps, weight_decay)
    return (), None


@megatron_order(grad_norm, "norm of the per-parameter norms, squared and rooted again in double", explicit=True,
                same_bits="Paddle's kernels add in torch's order")
def megatron_grad_norm(K, gradients):
    norms = K.cat([K.vector_norm(g).reshape([1]) for g in gradients], 0)
    norm = K.vector_norm(norms)
    return float(norm**2.0) ** 0.5, None
