"""Is every number finite? Asked quickly, and answered in words where one is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

SMALL = 1 << 16  # elements up to which numpy is quicker than a kernel of Paddle's
FLOATS = (paddle.float32, paddle.bfloat16, paddle.float64, paddle.float16)


def is_finite(x: Any) -> bool:
    """Whether a tensor or a Python number holds neither NaN nor infinity. What is no float is finite."""
    if not isinstance(x, Tensor):
        return not isinstance(x, float) or math.isfinite(x)
    if x.dtype not in FLOATS:
        return True
    x = x.detach()
    if math.isfinite(_sum(x)):  # then so is every term
        return True
    return bool(paddle.isfinite(x).all())  # the sum may have overflown


def described(x: Any) -> str:
    """What is not finite in ``x``: "2 of 64 numbers are not finite (nan at [0, 3])"."""
    if not isinstance(x, Tensor):
        return f"it is {x}"
    values = _array(x.detach())
    wrong = np.argwhere(~np.isfinite(values))
    first = wrong[0].tolist()
    verb = "is" if len(wrong) == 1 else "are"
    return f"{len(wrong)} of {values.size} numbers {verb} not finite ({values[tuple(first)]} at {first})"


def kind(x: Any) -> str:
    """ "float32 [2, 3]" for a tensor, its type for anything else."""
    return f"{str(x.dtype).removeprefix('paddle.')} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _array(x: Tensor) -> np.ndarray:
    return (x.astype("float32") if x.dtype == paddle.bfloat16 else x).numpy()


def _sum(x: Tensor) -> float:
    if math.prod(x.shape) > SMALL:  # x.size takes longer than the sum of a small tensor
        return float(x.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        return float(_array(x).sum())
