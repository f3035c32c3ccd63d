"""Clamped SwiGLU: silu(min(gate, c)) clip(linear, -c, c), times the expert's weight."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.reduce import row_sum

swiglu = define("swiglu", "clamped SwiGLU, weighted by the routing probability before the second linear", spec="9.5")


@swiglu.variant("paddle", "hand-written backward")
@differentiable
def paddle_swiglu(x: Tensor, prob: Tensor | None, limit: float):
    """x [..., 2F] (gate, then linear), prob [...] or None -> [..., F] in the dtype of x.

    The clamp's gradient is 1 inside and on the bound, 0 outside.
    """
    gate, up = paddle.chunk(x, 2, -1)
    g, u = gate.clip(max=limit), up.clip(-limit, limit)
    sigma = F.sigmoid(g)
    silu = g * sigma
    h = silu * u

    def backward(dy):
        if prob is not None:
            dprob = (row_sum(dy * h).squeeze(-1).astype(prob.dtype),)
            dy = dy * prob.unsqueeze(-1)
        else:
            dprob = ()
        dgate = dy * u * (sigma + silu * (1.0 - sigma)) * (gate <= limit).astype(x.dtype)
        dup = dy * silu * (up.abs() <= limit).astype(x.dtype)
        return (paddle.concat([dgate, dup], -1).astype(x.dtype), *dprob)

    return h if prob is None else (h * prob.unsqueeze(-1)).astype(x.dtype), backward


@swiglu.variant("plain", "the formula, differentiated by autograd")
def plain_swiglu(x: Tensor, prob: Tensor | None, limit: float) -> Tensor:
    gate, up = paddle.chunk(x, 2, -1)
    h = F.silu(gate.clip(max=limit)) * up.clip(-limit, limit)
    return h if prob is None else (h * prob.unsqueeze(-1)).astype(x.dtype)


@megatron_order(swiglu, "silu(clamp(gate)) (clamp(linear) + 0), times prob in float32, cast; each in the dtype of x")
def megatron_swiglu(K, x, prob, limit):
    gate, up = K.chunk(x, 2, -1)
    h = K.silu(K.clamp(gate, None, limit)) * (K.clamp(up, -limit, limit) + 0.0)
    return h if prob is None else K.cast(K.scale_rows(h, prob.unsqueeze(-1)), K.dtype(x))
