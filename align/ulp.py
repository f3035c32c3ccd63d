"""Distances between float32 numbers counted in representable steps (units in the last place)."""

from __future__ import annotations

import numpy as np


def ordered(values: np.ndarray) -> np.ndarray:
    """Number the float32 values along the real line: neighbours differ by one, and both zeros are 0.

    Args:
        values: float32, any shape; no NaN (a NaN has no place on the line, its number means nothing).

    Returns:
        int64, the same shape. Infinity is the step after the largest finite number.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def ulp_distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The number of float32 steps from ``left`` to ``right``.

    Args:
        left, right: float32, of one shape.

    Returns:
        float64 of that shape: a whole number (below 2**33, so exact), or NaN where either side is NaN.
    """
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    steps = np.abs(ordered(left) - ordered(right)).astype(np.float64)
    return np.where(np.isnan(left) | np.isnan(right), np.nan, steps)
