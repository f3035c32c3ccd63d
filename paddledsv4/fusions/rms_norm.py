"""RMS normalisation as one kernel each way."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, flat, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.rms_norm import head_norm, rms_norm

NOTE = "one Triton kernel each way, float32 inside"
WIDEST = 32768  # a row is held in registers


@rms_norm.variant("fused", NOTE, needs="triton", refuses=refusal)
@differentiable
def fused_rms_norm(x: Tensor, weight: Tensor, eps: float):
    """x [..., L], weight [L] -> [..., L] in the dtype of x."""
    return _norm("rms_norm", x, weight, eps)


@head_norm.variant("fused", NOTE, needs="triton", refuses=refusal)
@differentiable
def fused_head_norm(x: Tensor, eps: float):
    """x [..., D] -> [..., D] in the dtype of x."""
    y, backward = _norm("head_norm", x, None, eps)
    return y, lambda dy: backward(dy)[:1]


def _norm(op: str, x: Tensor, weight: Tensor | None, eps: float):
    from paddledsv4.kernels import rms_norm as kernel

    width = x.shape[-1]
    check(op, x, width=(width, width <= WIDEST, f"of at most {WIDEST}"))
    rows = flat(x, width)

    def backward(dy):
        dx, dw = kernel.backward(CARRIER, flat(dy, width), rows, weight, eps)
        return dx.reshape(x.shape), dw

    return kernel.forward(CARRIER, rows, weight, eps).reshape(x.shape), backward
