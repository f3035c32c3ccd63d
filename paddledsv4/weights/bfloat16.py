"""bfloat16 in numpy, which has none: the uint16 of its bits, the upper half of the float32 with the same value."""

from __future__ import annotations

import numpy as np


def decode(bits: np.ndarray) -> np.ndarray:
    """uint16 bits [...] -> float32 [...], exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """float32 [...] without NaN -> uint16 bits [...], rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype(np.uint16)
