"""Read many decimal numbers at once, each exactly as ``float()`` reads it.

Digits become a sum of two float64 (double-double), which is divided by the power of ten. The result is wrong only
where it lies so near the middle between two float64 that the error of about 2**-104 could decide; those are told
apart, and the caller reads them one by one (T. J. Dekker, "A floating-point technique for extending the available
precision", 1971).
"""

from __future__ import annotations

import numpy as np

MOST_DECIMALS = 22  # 10**22 is the largest power of ten that a float64 holds
MOST_DIGITS = 30
HALF = 15  # digits in each of the two numbers that the text is split into; 10**15 < 2**53
_SPLITTER = 2.0**27 + 1


def weights(places: list[int | None]) -> np.ndarray:
    """Weights [len(places), 2] that turn columns of digits into (upper, lower) halves of a whole number.

    Args:
        places: of each column, how many digits follow it; None for a column that is no digit.
    """
    table = np.zeros((len(places), 2))
    for column, place in enumerate(places):
        if place is not None:
            table[column, int(place < HALF)] = 10.0 ** (place % HALF)
    return table


def decimals(upper: np.ndarray, lower: np.ndarray, fraction: int) -> tuple[np.ndarray, np.ndarray]:
    """``(upper * 10**15 + lower) / 10**fraction``, rounded once.

    Args:
        upper, lower: float64 [n], whole numbers in [0, 10**15).
        fraction: digits behind the point, at most :data:`MOST_DECIMALS`.

    Returns:
        float64 [n], and bool [n]: where the rounding is certain.
    """
    scale = 10.0**fraction
    product, rest = _product(upper, 10.0**HALF)
    whole, carry = _sum(product, lower)
    rest += carry  # whole numbers below 2**53: exact
    quotient = whole / scale
    back, error = _product(quotient, scale)
    correction = ((whole - back) - error + rest) / scale
    value, low = _sum(quotient, correction)
    return value, value + low * (1 + 2.0**-40) == value


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b as rounded sum and its exact error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product(a: np.ndarray, b: float) -> tuple[np.ndarray, np.ndarray]:
    """a * b as rounded product and its exact error."""
    product = a * b
    a1, a2 = _split(a)
    b1, b2 = _split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _split(a):
    """Two numbers of 26 bits each whose sum is a."""
    spread = _SPLITTER * a
    upper = spread - (spread - a)
    return upper, a - upper
