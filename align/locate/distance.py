"""How far a result is from the reference's, against what legal computations differ by on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from align.ulp import ulp_distance

# How far beyond the measured noise a result must lie to be called a fault. The noise is the largest of a few legal
# computations, so another legal one exceeds it now and then, by a factor near one; faults exceed it by orders.
MARGIN = 8.0


def numbers(x: Any) -> np.ndarray:
    """A tensor, or a Python number, as an array; floating-point numbers as float64."""
    if isinstance(x, Tensor):
        x = x.astype("float32").numpy() if x.dtype == paddle.bfloat16 else x.numpy()
    array = np.asarray(x)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arguments or results are the same to the last bit. A NaN equals nothing, not even its own bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
            return False
        return not a.is_floating_point() or not np.isnan(numbers(a)).any()
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


@dataclass(frozen=True)
class Error:
    """A result against the reference's.

    Attributes:
        rms: norm of the difference over norm of the reference.
        peak: largest difference over largest magnitude of the reference.
        scale: what a best fit ``ours = (1 + scale) reference`` gives: the part of the error that is bias.
        max_ulp: largest distance in float32 steps (of a bfloat16 result, in its own).
        equal: share of elements with equal bits.
        size: number of elements.
        choice: of whole numbers, which are chosen and not rounded: all errors are infinite or 0.
    """

    rms: float
    peak: float
    scale: float
    max_ulp: float
    equal: float
    size: int
    choice: bool = False

    @classmethod
    def of(cls, ours: Any, reference: Any) -> Error:
        """None counts as zeros; a NaN on either side or both, or another shape, is infinitely far."""
        if ours is None or reference is None:
            shape = numbers(reference if ours is None else ours).shape
            ours = np.zeros(shape) if ours is None else ours
            reference = np.zeros(shape) if reference is None else reference
        a, b = numbers(ours), numbers(reference)
        if a.shape != b.shape:
            return cls(np.inf, np.inf, np.inf, np.inf, 0.0, a.size)
        same = a == b
        if same.all():
            return cls(0.0, 0.0, 0.0, 0.0, 1.0, a.size)
        if a.dtype.kind != "f":
            return cls(np.inf, np.inf, np.inf, np.inf, float(same.mean()), a.size, choice=True)
        difference = np.where(same, 0.0, a - b)
        if not np.isfinite(difference).all():
            return cls(np.inf, np.inf, np.inf, np.inf, float(same.mean()), a.size)
        norm, top = np.sqrt(np.square(b[np.isfinite(b)]).sum()), np.abs(b[np.isfinite(b)]).max(initial=0.0)
        finite = np.where(np.isfinite(b), b, 0.0)
        unit = 2.0**16 if isinstance(reference, Tensor) and reference.dtype == paddle.bfloat16 else 1.0
        return cls(
            rms=_ratio(np.sqrt(np.square(difference).sum()), norm),
            peak=_ratio(np.abs(difference).max(), top),
            scale=float((difference * finite).sum() / max(norm**2, 1e-300)),
            max_ulp=float(np.nanmax(ulp_distance(a, b)) / unit),
            equal=float(same.mean()),
            size=a.size,
        )


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else (np.inf if a else 0.0)


@dataclass
class Noise:
    """The largest errors that legal computations of one result have against the reference's."""

    rms: float = 0.0
    peak: float = 0.0
    scale: float = 0.0
    flips: float = 0.0

    def add(self, error: Error) -> None:
        """Widen by one legal computation. One that is not finite says nothing: it excuses no other."""
        if np.isfinite(error.rms):
            self.rms, self.peak = max(self.rms, error.rms), max(self.peak, error.peak)
            self.scale = max(self.scale, abs(error.scale))
        elif error.choice:
            self.flips = max(self.flips, 1.0 - error.equal)

    def excess(self, error: Error, epsilon: float) -> float:
        """How many times the noise the error is; 0 for equal bits. ``epsilon``: what one rounding inside the op may be,
        below which no noise is taken to lie.

        Bias is held against what independent errors of this size would add up to, so a small but systematic error
        shows that the size alone would hide.
        """
        if error.rms == 0.0:
            return 0.0
        if not np.isfinite(error.rms):
            return 0.0 if error.choice and 1.0 - error.equal <= self.flips else np.inf
        rms = max(self.rms, epsilon)
        bias = max(self.scale, rms * 3.0 / np.sqrt(error.size), epsilon)  # a kernel's own bias is of this order
        return float(max(error.rms / rms, error.peak / max(self.peak, epsilon), abs(error.scale) / bias))


def rounding_inside(x: Any) -> float:
    """Largest relative error of one rounding inside an op with result ``x``: bfloat16 is computed in float32."""
    if not isinstance(x, Tensor) or x.dtype == paddle.float64:
        return 2.0**-53
    return 2.0**-24


def describe(ours: Any, reference: Any, error: Error, excess: float) -> str:
    """A verdict in words: identical; reordered; a cast; a scale; a flipped choice; wrong."""
    if error.equal == 1.0:
        return "identical"
    if not np.isfinite(error.rms):
        if isinstance(reference, Tensor) and not reference.is_floating_point():
            return f"another choice in {1 - error.equal:.2%} of the places"
        return "wrong: not finite, or another shape"
    if excess <= MARGIN:
        return "reordered: within the noise of legal computations"
    if abs(error.scale) > 0.9 * error.rms:
        return f"scale error of {error.scale:+.4%}"
    if _by_rows(ours, reference) < 0.2:
        return "scale error that changes from row to row, as a wrong epsilon or a wrong norm gives"
    return _cast(ours, reference, error) or "wrong"


def _by_rows(ours: Any, reference: Any) -> float:
    """What is left of the error, as a share, when every row may have a scale of its own; 1 for single numbers."""
    a, b = numbers(ours), numbers(reference)
    if a.ndim < 2 or a.shape[-1] < 4:
        return 1.0
    rest = a - b * ((a * b).sum(-1, keepdims=True) / np.maximum((b * b).sum(-1, keepdims=True), 1e-300))
    return _ratio(np.sqrt(np.square(rest).sum()), np.sqrt(np.square(a - b).sum()))


def _cast(ours: Any, reference: Any, error: Error) -> str:
    """What speaks for a cast to bfloat16 in the wrong place; "" if nothing does."""
    if isinstance(reference, Tensor) and reference.dtype == paddle.bfloat16:
        return "one cast earlier or later: within two units of bfloat16" if error.max_ulp <= 2 else ""
    early, late = _are_bfloat16(ours), _are_bfloat16(reference)
    if early == late or error.rms > 2.0**-8:
        return ""
    return "one cast to bfloat16 too early" if early else "a cast to bfloat16 missing, or later"


def _are_bfloat16(x: Any) -> bool:
    """Whether every number is one that bfloat16 holds."""
    low = np.ascontiguousarray(numbers(x), np.float32).view(np.uint32) & 0xFFFF
    return not low.any()
