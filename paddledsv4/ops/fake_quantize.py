"""Rounding to a narrow number format and back: what a served model's caches do to their numbers, done in training.

Every block of numbers has a scale, amax / largest of the format, either as it is or rounded up to a power of two
(ue8m0). Numbers over their scale are rounded to the format's, ties to even, and multiplied back (peers-spec 3.A, the
formula of DeepSeek's act_quant and fp4_act_quant). The gradient passes straight through.

All results are fixed by the format, whatever computes them, so this is a setting and no op of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.precision import at_least

EXPONENT, MANTISSA = 0x7F800000, 0x7FFFFF  # bits of a float32
TO_WHOLE = 1.5 * 2.0**23  # added and taken away, it leaves a float32 rounded to whole numbers, ties to even


@dataclass(frozen=True)
class Format:
    """Floating-point numbers in blocks along the last dimension.

    Attributes:
        block: numbers that share a scale; the last block of a row may be smaller.
        largest: the largest number.
        normal: the smallest number with all mantissa bits; below it steps stay the same.
        mantissa: bits.
        floor: a block's amax counts as this at least.
        power_of_two: whether scales are rounded up to powers of two.
    """

    block: int
    largest: float
    normal: float
    mantissa: int
    floor: float
    power_of_two: bool


FORMATS = {
    "ue8m0": Format(64, 448.0, 2.0**-6, 3, 1e-4, True),  # e4m3
    "fp32_scale": Format(64, 448.0, 2.0**-6, 3, 1e-4, False),
    "fp4": Format(32, 6.0, 1.0, 1, 6 * 2.0**-126, True),  # e2m1
}


def _bits(x: Tensor, mask: int) -> Tensor:
    """float32 whose bits outside ``mask`` are cleared."""
    return paddle.bitwise_and(x.view("int32"), paddle.full([1], mask, "int32")).view("float32")


def _power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2 x) of positive, normal float32; infinity of infinity and NaN."""
    return _bits(x, EXPONENT)


def _power_of_two_above(x: Tensor) -> Tensor:
    """2^ceil(log2 x) of the same."""
    return _bits((x.view("int32") + MANTISSA).view("float32"), EXPONENT)


def _round(x: Tensor, format: Format) -> Tensor:
    """float32 to the nearest number of the format, ties to even; beyond its largest, that. NaN stays."""
    x = x.clip(-format.largest, format.largest)
    step = at_least(_power_of_two_below(x.abs()), format.normal) * 2.0**-format.mantissa
    return (x / step + TO_WHOLE - TO_WHOLE) * step


def _quantized(x: Tensor, format: Format) -> Tensor:
    """float32 [..., block] -> the same, rounded."""
    scale = at_least(x.abs().max(-1, keepdim=True), format.floor) * (1.0 / format.largest)
    scale = _power_of_two_above(scale) if format.power_of_two else scale
    return _round(x / scale, format) * scale


@differentiable
def fake_quantize(x: Tensor, format: Format, kept: int = 0):
    """x [..., D] -> [..., D] of its dtype, a new tensor; the last ``kept`` dimensions pass unchanged.

    Computed in float32. What is not finite stays so.
    """
    width = x.shape[-1] - kept
    rest = -width % format.block
    wide = x[..., :width].astype("float32")
    padded = paddle.concat([wide, paddle.zeros([*x.shape[:-1], rest], "float32")], -1) if rest else wide
    blocks = _quantized(padded.reshape([*x.shape[:-1], -1, format.block]), format)
    rounded = blocks.reshape(padded.shape)[..., :width].astype(x.dtype)
    return paddle.concat([rounded, x[..., width:]], -1) if kept else rounded, lambda dy: (dy,)


def unchanged(x: Tensor) -> Tensor:
    """x."""
    return x


def quantizer(setting: str, kept: int = 0) -> Callable[[Tensor], Tensor]:
    """The function x [..., D] -> [..., D] of a value of ``training.kv_qat`` or ``training.indexer_qat``; off: x itself.

    ``kept``: so many last dimensions pass unchanged.
    """
    if setting == "off":
        return unchanged
    return functools.partial(fake_quantize, format=FORMATS[setting], kept=kept)
