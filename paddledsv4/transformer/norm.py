"""RMSNorm layer."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build, constant


class RMSNorm(nn.Layer):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension."""

    def __init__(self, build: Build, size: int):
        super().__init__()
        self.ops = build.ops
        self.eps = build.config.rms_norm_eps
        self.weight = constant([size], build.dtype, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)
