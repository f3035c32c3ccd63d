"""The precision in which an op accumulates: float32, or float64 where its input already is."""

from __future__ import annotations

from paddle import Tensor


def accumulate_dtype(dtype) -> str:
    """"float64" for float64, "float32" for everything narrower."""
    return "float64" if "float64" in str(dtype) else "float32"


def widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation precision; ``x`` itself when it is there already."""
    dtype = accumulate_dtype(x.dtype)
    return x if dtype in str(x.dtype) else x.astype(dtype)


def dtype_name(x: Tensor) -> str:
    """"float32" for a tensor of paddle.float32: a plain string that caches can key on."""
    return str(x.dtype).split(".")[-1]
