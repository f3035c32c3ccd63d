"""Loss curves of two runs, a few hundred points each, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.compare import common, matches
from align.losslog import LossSeries, float32
from align.ulp import ulp_distance

POINTS = 500  # at most; longer runs are averaged over stretches of steps


@dataclass(frozen=True)
class Curve:
    """One kind of loss. All arrays are [n], one entry per step or stretch of steps.

    Attributes:
        kind: ``main`` or ``mtp``.
        first, last: the steps of the stretch.
        reference, candidate: mean loss over its microbatches and ranks; NaN where a loss is absent, NaN or Inf.
        differs: True where any loss of the stretch does not match or is absent.
        ulp: the largest distance within the stretch; NaN where one of the losses is absent or NaN.
    """

    kind: str
    first: np.ndarray
    last: np.ndarray
    reference: np.ndarray
    candidate: np.ndarray
    differs: np.ndarray
    ulp: np.ndarray

    @property
    def differing(self) -> int:
        """How many of the stretches differ."""
        return int(np.count_nonzero(self.differs))


def curve(kind: str, reference: LossSeries, candidate: LossSeries) -> Curve:
    """The curves of two series; the reference says which steps there are."""
    here, there = common(reference.keys, candidate.keys)
    values, differs, ulp = (np.full(len(reference), fill) for fill in (np.nan, True, np.nan))
    left, right = reference.take(here), candidate.take(there)
    values[here], differs[here] = right.values, ~matches(left, right)
    ulp[here] = ulp_distance(float32(left.values), float32(right.values))
    steps, step_of = np.unique(reference.keys >> 32, return_inverse=True)
    size = -(-len(steps) // POINTS) or 1
    stretch, starts = step_of // size, np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    worst = np.zeros(len(starts))
    with np.errstate(invalid="ignore"):
        np.maximum.at(worst, stretch, ulp)  # keeps NaN
    return Curve(
        kind,
        steps[starts],
        steps[ends],
        _means(reference.values, stretch, len(starts)),
        _means(values, stretch, len(starts)),
        np.bincount(stretch, differs, len(starts)) > 0,
        worst,
    )


def _means(values: np.ndarray, stretch: np.ndarray, count: int) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        means = np.bincount(stretch, values, count) / np.bincount(stretch, minlength=count)
    return np.where(np.isfinite(means), means, np.nan)
