"""The arithmetic of one optimizer step: gradient norm, clipping, AdamW. All in place on float32 or wider."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor

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
