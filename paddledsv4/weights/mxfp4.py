"""MXFP4 weights: e2m1 numbers, two to a byte, with an e8m0 scale for every 32 along a row (OCP microscaling 1.0).

A byte holds an even column in its low nibble and the odd one after it in its high nibble. A nibble is a sign and one of
eight magnitudes. A scale byte b is 2^(b - 127): 0 is 2^-127, a subnormal float32, and 255 is NaN. numpy only, so that a
converter needs no framework; a layer that keeps its experts in this format takes the same tables.
"""

from __future__ import annotations

import functools

import numpy as np

from paddledsv4.weights.fp8 import E8M0
from paddledsv4.weights.lookup import look_up, table

BLOCK = 32
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, 0 - MAGNITUDES])  # of every nibble; 8 is zero like 0, without a sign
PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], 1)  # [256, 2]: even and odd column of every byte
_BETWEEN = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of an unpacked array: [..., in] -> [..., in / 32]."""
    return *shape[:-1], shape[-1] // BLOCK


@functools.cache
def _products(narrow: bool) -> np.ndarray:
    return table(PAIRS, E8M0, narrow)


def dequantize(packed: np.ndarray, scales: np.ndarray, narrow: bool = False) -> np.ndarray:
    """packed int8 or uint8 [..., in / 2], scales uint8 [..., in / 32] -> float32 [..., in].

    ``narrow``: bfloat16 bits, which hold every product exactly (6 x 2^127 is infinite in float32 too).
    """
    codes = packed.view(np.uint8).reshape(-1, scales.shape[-1], BLOCK // 2)
    found = look_up(_products(narrow), scales.reshape(-1, scales.shape[-1], 1), codes)
    return found.view(np.uint16 if narrow else np.float32).reshape(*packed.shape[:-1], -1)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., in], finite -> packed int8 [..., in / 2], scales uint8 [..., in / 32].

    A block's exponent is floor(log2(its largest magnitude)) - 2, the byte from 1 to 254; larger numbers saturate at 6.
    Ties go toward zero (peers-spec 5.2). Numbers that the format can hold come back exactly.
    """
    blocks = np.ascontiguousarray(values, np.float32).reshape(*scale_shape(values.shape), BLOCK)
    largest = np.abs(blocks).max(-1)
    exponent = np.frexp(largest)[1] - 1 - 2
    scales = np.clip(exponent + 127, 1, 254).astype(np.uint8)  # frexp(0) is (0, 0): a block of zeros gets 124
    size = np.abs(blocks) / E8M0[scales][..., None]
    codes = sum((size > between).astype(np.uint8) for between in _BETWEEN)
    codes |= (blocks < 0).astype(np.uint8) << 3
    codes = codes.reshape(*values.shape[:-1], -1, 2)
    return (codes[..., 0] | codes[..., 1] << 4).view(np.int8), scales
