"""How numbers lie in a file: dtypes, shapes of packed weights and of their scales, and the values they stand for.

A weight may lie as numbers (BF16, F32, ...), as FP8 (F8_E4M3, with scales of 128 x 128) or as FP4 (I8, with scales of
32 along a row). Which, its dtype says, not the config: some releases keep experts in FP8.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.weights import bfloat16, fp8, mxfp4
from paddledsv4.weights.names.table import Kind

# safetensors' dtype -> the dtype that numpy holds its bytes in
NUMPY = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"), "F8_E8M0": np.dtype("u1"),
}  # fmt: skip
FLOATS, INTEGERS, SCALES = ("BF16", "F32", "F16", "F64"), ("I64", "I32"), ("F8_E8M0", "F32")
NOT_FINITE = {
    "F64": 0x7FF0 << 48, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF,
}  # fmt: skip
PACKED = {"I8": mxfp4.scale_shape, "F8_E4M3": fp8.scale_shape}


class Storage(NamedTuple):
    """dtype of a weight, and of its scales if it has any."""

    weight: str
    scale: str | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the stored weight, whose numbers have ``shape``: FP4 keeps two in a byte."""
        return (*shape[:-1], shape[-1] // 2) if self.weight == "I8" else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a packed weight."""
        return PACKED[self.weight](shape)


RELEASED: dict[Kind, Storage] = {
    "FP4": Storage("I8", "F8_E8M0"),
    "FP8": Storage("F8_E4M3", "F8_E8M0"),
    "BF16": Storage("BF16"),
    "F32": Storage("F32"),
    "I64": Storage("I64"),
}


def legal(kind: Kind) -> tuple[str, ...]:
    """The dtypes that a tensor of a kind may have in a file."""
    if kind == "I64":
        return INTEGERS
    return (*FLOATS, *PACKED) if kind in ("FP4", "FP8") else FLOATS


def scale_name(format: str, weight: str) -> str:
    """The name of the scales of a packed weight."""
    if format == "released":
        return weight.removesuffix("weight") + "scale"
    return weight + ("_scale_inv" if format == "hf" else "_scale")


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes."""
    return math.prod(shape) * NUMPY[dtype].itemsize


def check_finite(dtype: str, raw: np.ndarray) -> None:
    """Raise ``ValueError`` if a number is NaN or infinite: its bits, but for the sign, are at least ``NOT_FINITE``."""
    if dtype not in NOT_FINITE or not raw.size:
        return
    bits = raw.view(f"u{raw.itemsize}")
    sign = 1 << (8 * raw.itemsize - 1)
    bad = bits.max() >= NOT_FINITE[dtype] | sign  # negative ones are the largest unsigned numbers
    if dtype != "F8_E8M0":
        bad |= bits.view(f"i{raw.itemsize}").max() >= NOT_FINITE[dtype]
    if bad:
        raise ValueError("has NaN or infinite numbers")


def decode(storage: Storage, weight: np.ndarray, scale: np.ndarray | None, narrow: bool = False) -> np.ndarray:
    """What is stored -> float32 numbers, exact but for F64 (and F32 scales that are no powers of two).

    ``narrow``: bfloat16 bits instead, rounded to nearest.
    """
    if storage.weight in PACKED:
        unpack = mxfp4.dequantize if storage.weight == "I8" else fp8.dequantize
        return unpack(weight, scale, narrow)
    if storage.weight == "BF16":
        return weight if narrow else bfloat16.decode(weight)
    values = weight.astype(np.float32, copy=False)
    return bfloat16.encode(values) if narrow else values


def encode(values: np.ndarray, storage: Storage) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 numbers -> what is stored: weight, and scales or None."""
    if storage.weight == "I8":
        return mxfp4.quantize(values)
    if storage.weight == "F8_E4M3":
        return fp8.quantize(values, storage.scale)
    if storage.weight == "BF16":
        return bfloat16.encode(values), None
    return values.astype(NUMPY[storage.weight], copy=False), None


def check_packable(name: str, storage: Storage, shape: tuple[int, ...]) -> None:
    """Refuse an FP4 weight whose rows are no whole blocks.

    Raises:
        UserError: it names the tensor.
    """
    if storage.weight == "I8" and shape[-1] % mxfp4.BLOCK:
        raise UserError(f"tensor {name} has rows of {shape[-1]}, FP4 needs multiples of {mxfp4.BLOCK}")
