"""RMS normalisation as one kernel each way."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.rms_norm import rms_norm


@rms_norm.variant("fused", "one Triton kernel each way, float32 inside", needs="triton", refuses=refusal)
@differentiable
def fused_rms_norm(x: Tensor, weight: Tensor, eps: float):
    """x [..., L], weight [L] -> [..., L] in the dtype of x."""
    from paddledsv4.kernels import rms_norm as kernel

    rows = x.reshape([-1, x.shape[-1]])
    y, r = kernel.forward(CARRIER, rows, weight, eps)

    def backward(dy):
        dx, dw = kernel.backward(CARRIER, dy.reshape(rows.shape), rows, weight, r)
        return dx.reshape(x.shape), dw

    return y.reshape(x.shape), backward
