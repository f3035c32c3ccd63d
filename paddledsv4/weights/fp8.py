"""FP8 weights: e4m3 numbers with one scale for every block of 128 x 128, as the released files keep them.

e4m3 ("fn"): sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities, 0x7f and 0xff are NaN, the largest number
is 448. A scale is a float32, or an e8m0 byte b of value 2^(b - 127), b = 255 being NaN (OCP microscaling 1.0, section
5.4.1). The last block of a row or column may be smaller than 128.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from paddledsv4.weights import bfloat16
from paddledsv4.weights.lookup import look_up, table

BLOCK = 128
LARGEST = np.float32(448)
_SUBNORMAL = np.float32(2.0**-6)  # below it the steps are 2^-9


def _table() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    table = np.where(codes & 128, -size, size).astype(np.float32)
    table[[0x7F, 0xFF]] = np.nan
    return table


E4M3 = _table()
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))  # value of every byte


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a matrix: [out, in] -> [ceil(out / 128), ceil(in / 128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


@functools.cache
def _products(narrow: bool) -> np.ndarray:
    return table(E4M3, E8M0, narrow)


def dequantize(codes: np.ndarray, scales: np.ndarray, narrow: bool = False) -> np.ndarray:
    """codes uint8 [out, in], scales uint8 (e8m0) or float32 [ceil(out / 128), ceil(in / 128)] -> float32 [out, in].

    ``narrow``: bfloat16 bits, rounded once.
    """
    columns = np.repeat(scales, BLOCK, 1)[:, : codes.shape[1]]
    if scales.dtype == np.uint8:
        products = _products(narrow)
        blocks = [look_up(products, row[None], codes[i * BLOCK : (i + 1) * BLOCK]) for i, row in enumerate(columns)]
        return np.concatenate(blocks).view(np.uint16 if narrow else np.float32)
    values = E4M3[codes]
    for block, factors in enumerate(columns):
        values[block * BLOCK : (block + 1) * BLOCK] *= factors
    return bfloat16.encode(values) if narrow else values


def quantize(values: np.ndarray, scale: Literal["F8_E8M0", "F32"] = "F8_E8M0") -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> codes uint8 [out, in] and scales, uint8 (e8m0) or float32.

    A block's scale is its largest magnitude / 448, for e8m0 rounded up to a power of two; a block of zeros has 1.
    """
    rows, columns = scale_shape(values.shape)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), np.float32)
    padded[: values.shape[0], : values.shape[1]] = np.abs(values)
    largest = padded.reshape(rows, BLOCK, columns, BLOCK).max((1, 3))
    scales = np.where(largest > 0, largest / LARGEST, np.float32(1)).astype(np.float32)
    if scale == "F8_E8M0":
        fraction, exponent = np.frexp(scales)  # scales = fraction 2^exponent, fraction in [0.5, 1)
        bytes_ = np.clip(exponent - (fraction == 0.5) + 127, 0, 254).astype(np.uint8)
        kept, scales = bytes_, E8M0[bytes_]
    else:
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
        kept = scales
    factors = np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)[: values.shape[0], : values.shape[1]]
    return encode(values / factors), kept


def encode(values: np.ndarray) -> np.ndarray:
    """float32 [...] without NaN -> e4m3 bytes, rounded to nearest, ties to even; beyond 448 the largest number."""
    size = np.minimum(np.abs(values), LARGEST)
    bits = np.ascontiguousarray(size, np.float32).view(np.uint32)
    # Of a normal number keep 3 mantissa bits and shift the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20).astype(np.int32) - (120 << 3)
    small = np.rint(size * np.float32(512)).astype(np.int32)
    codes = np.where(size < _SUBNORMAL, small, normal)
    return (codes | np.signbit(values) * 128).astype(np.uint8)
