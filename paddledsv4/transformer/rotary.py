"""Rotary tables: plain for sliding-window layers, YaRN for layers with compressed entries (spec section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from paddle import Tensor

from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError


@dataclass(frozen=True)
class RotaryEmbedding:
    """Angles of the rotary dimensions at every position. ``yarn_factor`` None means no YaRN.

    A factor of 1 scales nothing, but the reference mixes the two equal frequencies all the same, which rounds.
    The YaRN concentration factor is not used: the angles change, the magnitude stays.
    """

    dim: int
    base: float
    yarn_factor: float | None = None
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    max_positions: int | None = None

    @classmethod
    def for_ratio(cls, config: ModelConfig, ratio: int) -> RotaryEmbedding:
        """The table of a layer: everything in it, compressor and indexer included, uses the same one."""
        limit = config.max_positions
        if ratio == 0:
            return cls(config.qk_rope_head_dim, float(config.rope_theta), max_positions=limit)
        base, scaling = float(config.compress_rope_theta), config.rope_scaling
        if scaling is None:
            return cls(config.qk_rope_head_dim, base, max_positions=limit)
        return cls(
            config.qk_rope_head_dim, base, float(scaling.factor), scaling.original_max_position_embeddings,
            float(scaling.beta_fast), float(scaling.beta_slow), limit,
        )

    def table(self, ops: SimpleNamespace, length: int, dtype: str, stride: int = 1) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, dim/2], of positions 0, stride, 2 stride, ...

        A table is made to the length that is asked for, so it is never short.

        Raises:
            UserError: the last position lies past ``max_positions``.
        """
        if self.max_positions is not None and (length - 1) * stride >= self.max_positions:
            raise UserError(
                f"position {(length - 1) * stride} lies past the {self.max_positions} positions of this model: "
                "use shorter sequences, or raise max_position_embeddings in its config"
            )
        low, high = self._ramp()
        return ops.rope_table(length, stride, dtype, self.dim, self.base, self.yarn_factor, low, high)

    def _correction_dim(self, rotations: float) -> float:
        """The dimension whose wavelength fits ``rotations`` times into the original context."""
        wavelengths = self.original_max_position / (rotations * 2 * math.pi)
        return self.dim * math.log(wavelengths) / (2 * math.log(self.base))

    def _ramp(self) -> tuple[float, float]:
        """First and last dimension of the passage from unscaled to scaled frequencies."""
        if self.yarn_factor is None:
            return 0, 1
        low = max(math.floor(self._correction_dim(self.beta_fast)), 0)
        high = min(math.ceil(self._correction_dim(self.beta_slow)), self.dim - 1)
        return low, high if high != low else high + 0.001
