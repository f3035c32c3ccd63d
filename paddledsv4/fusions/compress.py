"""Compressor pooling as one kernel each way."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.compress import compress

LARGEST = 1024  # tokens of a group: a window is held in registers


@compress.variant("fused", "one Triton kernel each way, float32 inside; ape's gradient in two stages", needs="triton",
                  refuses=refusal)
@differentiable
def fused_compress(kv: Tensor, score: Tensor, ape: Tensor, ratio: int, overlap: bool):
    """kv and score [s, b, c*d], ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d]."""
    from paddledsv4.kernels import compress as kernel

    check("compress", kv, score, ape, ratio=(ratio, ratio <= LARGEST, f"of at most {LARGEST}"))
    inputs = kv.contiguous(), score.contiguous(), ape.contiguous(), ratio, overlap
    return kernel.forward(CARRIER, *inputs), lambda dout: kernel.backward(CARRIER, dout.contiguous(), *inputs)
