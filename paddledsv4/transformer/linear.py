"""Bias-free linear layer with its weight stored [out, in]."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build, parameter


class Linear(nn.Layer):
    """y = x W^T."""

    def __init__(self, build: Build, in_features: int, out_features: int):
        super().__init__()
        self.ops = build.ops
        normal = nn.initializer.Normal(0.0, build.config.initializer_range)
        self.weight = parameter([out_features, in_features], build.dtype, normal)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]. ``weight``: one of several copies of the layer's own, see fan_out."""
        return self.ops.linear(x, self.weight if weight is None else weight)
