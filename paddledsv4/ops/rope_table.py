"""Tables of rotary angles: plain, or scaled by YaRN (spec section 6)."""

from __future__ import annotations

import functools

import paddle

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

rope_table = define("rope_table", "cos and sin of every position's angles", spec="6", outputs=("cos", "sin"))


@rope_table.variant("paddle", "in the precision asked for")
@functools.lru_cache(maxsize=64)
def paddle_rope_table(
    length: int, stride: int, dtype: str, dim: int, base: float, factor: float | None, low: float, high: float
):
    """cos and sin [length, dim/2] of positions 0, stride, ... Dimensions up to ``low`` turn by base^(-2i/dim), from
    ``high`` on by that over ``factor``, between them by a ramp of the two. factor None: no scaling."""
    plain = 1.0 / base ** (paddle.arange(0, dim, 2, dtype=dtype) / dim)
    ramp = ((paddle.arange(dim // 2, dtype=dtype) - low) / (high - low)).clip(0.0, 1.0)
    frequencies = plain if factor is None else plain / factor * ramp + plain * (1.0 - ramp)
    angles = paddle.outer(paddle.arange(length, dtype=dtype) * stride, frequencies)
    return paddle.cos(angles), paddle.sin(angles)


@megatron_order(
    rope_table, "1 / base^x, 1 / (factor base^x), mixed by 1 - ramp; kernels' pow, cos and sin", constant=True
)
def megatron_rope_table(K, length, stride, dtype, dim, base, factor, low, high):
    exponent = K.arange(0, dim, 2, dtype=dtype) / dim
    frequencies = 1.0 / (base**exponent)
    if factor is not None:
        ramp = K.clamp((K.arange(dim // 2, dtype=dtype) - low) / (high - low), 0.0, 1.0)
        mask = 1.0 - ramp
        frequencies = (1.0 / (factor * base**exponent)) * (1 - mask) + frequencies * mask
    angles = (K.arange(length, dtype=dtype) * stride).unsqueeze(1) * frequencies.unsqueeze(0)
    return K.cos(angles), K.sin(angles)
