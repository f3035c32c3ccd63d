"""The precision in which an op accumulates: float32, or float64 where its input already is."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor


def accumulate_dtype(dtype) -> str:
    """"float64" for float64, "float32" for everything narrower."""
    return "float64" if dtype in (paddle.float64, "float64") else "float32"


def widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation precision; ``x`` itself when it is there already."""
    return x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float32")


def at_least(x: Tensor, low: float) -> Tensor:
    """``x`` or ``low``, whichever is more. NaN and infinity stay; of that ``clip(min=...)`` makes a finite number."""
    return x.clip(low, math.inf)


def dtype_name(x: Tensor) -> str:
    """"float32" for a tensor of paddle.float32: a plain string that caches can key on."""
    return str(x.dtype).split(".")[-1]
