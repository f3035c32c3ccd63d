"""Rotary position embedding as one kernel, into a new tensor."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, flat, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.rope import rope

WIDEST = 8192  # a head is held in registers


@rope.variant("fused", "one Triton kernel, float32 inside; backward is the inverse rotation", needs="triton",
              refuses=refusal)
@differentiable
def fused_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False):
    """x [s, ..., D] with D even, cos and sin [s, P/2] -> [s, ..., D]; the first D-P dimensions pass unchanged."""
    from paddledsv4.kernels import rope as kernel

    tokens, width = x.shape[0], x.shape[-1]
    check("rope", x, cos, sin, width=(width, width % 2 == 0 and width <= WIDEST, f"even and at most {WIDEST}"))
    cos, sin, heads = flat(cos, cos.shape[-1]), flat(sin, sin.shape[-1]), x.size // max(1, tokens * width)

    def rotate(v, back):
        return kernel.rotate(CARRIER, v.reshape([tokens, heads, width]).contiguous(), cos, sin, back).reshape(x.shape)

    return rotate(x, inverse), lambda dy: (rotate(dy, not inverse), None, None)
