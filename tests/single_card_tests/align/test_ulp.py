"""Distances in float32 steps."""

import numpy as np
import pytest

from align.ulp import ulp_distance

SMALLEST = float(np.float32(1e-45))


@pytest.mark.parametrize(
    ("left", "right", "steps"),
    [
        (1.0, 1.0, 0),
        (1.0, float(np.nextafter(np.float32(1), np.float32(2))), 1),
        (0.0, -0.0, 0),
        (-SMALLEST, SMALLEST, 2),
        (1.0, 2.0, 2**23),
        (float(np.finfo(np.float32).max), np.inf, 1),
        (np.inf, np.inf, 0),
        (-np.inf, np.inf, 2 * 0x7F800000),
    ],
)
def test_steps(left, right, steps):
    assert ulp_distance(left, right) == steps == ulp_distance(right, left)


@pytest.mark.parametrize(("left", "right"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan)])
def test_nan_is_nowhere(left, right):
    assert np.isnan(ulp_distance(left, right))
