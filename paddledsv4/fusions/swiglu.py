"""Clamped SwiGLU times probability as one kernel each way."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, flat, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.swiglu import swiglu


@swiglu.variant("fused", "one Triton kernel each way, float32 inside", needs="triton", refuses=refusal)
@differentiable
def fused_swiglu(x: Tensor, prob: Tensor | None, limit: float):
    """x [..., 2F] (gate, then linear), prob [...] or None -> [..., F] in the dtype of x."""
    from paddledsv4.kernels import swiglu as kernel

    check("swiglu", x, *(() if prob is None else (prob,)))
    features = x.shape[-1] // 2
    rows, weights = flat(x, 2 * features), None if prob is None else flat(prob)

    def backward(dy):
        dx, dprob = kernel.backward(CARRIER, flat(dy, features), rows, weights, limit)
        return (dx.reshape(x.shape), *(() if prob is None else (dprob.reshape(prob.shape),)))

    return kernel.forward(CARRIER, rows, weights, limit).reshape([*x.shape[:-1], features]), backward
