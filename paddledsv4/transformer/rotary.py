"""Rotary tables: plain for sliding-window layers, YaRN for layers with compressed entries (spec section 6)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import paddle
from paddle import Tensor

from paddledsv4.config import ModelConfig


@dataclass(frozen=True)
class RotaryEmbedding:
    """Angles of the rotary dimensions at every position. ``yarn_factor`` None means no scaling.

    The YaRN concentration factor is not used: the angles change, the magnitude stays.
    """

    dim: int
    base: float
    yarn_factor: float | None = None
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @classmethod
    def for_ratio(cls, config: ModelConfig, ratio: int) -> RotaryEmbedding:
        """The table of a layer: everything in it, compressor and indexer included, uses the same one."""
        if ratio == 0:
            return cls(config.qk_rope_head_dim, float(config.rope_theta))
        base, scaling = float(config.compress_rope_theta), config.rope_scaling
        if scaling is None:
            return cls(config.qk_rope_head_dim, base)
        return cls(
            config.qk_rope_head_dim, base, float(scaling.factor), scaling.original_max_position_embeddings,
            float(scaling.beta_fast), float(scaling.beta_slow),
        )

    def table(self, length: int, dtype: str, stride: int = 1) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, dim/2], of positions 0, stride, 2 stride, ..."""
        return _table(self, length, dtype, stride)

    def _correction_dim(self, rotations: float) -> float:
        """The dimension whose wavelength fits ``rotations`` times into the original context."""
        wavelengths = self.original_max_position / (rotations * 2 * math.pi)
        return self.dim * math.log(wavelengths) / (2 * math.log(self.base))

    def inverse_frequencies(self, dtype: str) -> Tensor:
        """[dim/2]."""
        plain = 1.0 / self.base ** (paddle.arange(0, self.dim, 2, dtype=dtype) / self.dim)
        if self.yarn_factor is None:
            return plain
        low = max(math.floor(self._correction_dim(self.beta_fast)), 0)
        high = min(math.ceil(self._correction_dim(self.beta_slow)), self.dim - 1)
        span = (high - low) or 0.001
        ramp = ((paddle.arange(self.dim // 2, dtype=dtype) - low) / span).clip(0.0, 1.0)
        return plain / self.yarn_factor * ramp + plain * (1.0 - ramp)


@functools.lru_cache(maxsize=32)
def _table(rotary: RotaryEmbedding, length: int, dtype: str, stride: int) -> tuple[Tensor, Tensor]:
    positions = paddle.arange(length, dtype=dtype) * stride
    angles = paddle.outer(positions, rotary.inverse_frequencies(dtype))
    return paddle.cos(angles), paddle.sin(angles)
