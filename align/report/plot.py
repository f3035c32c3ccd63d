"""The geometry of a chart as SVG paths. Colours and fonts are the page's: it follows dark mode and the reader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.report.curves import Curve

WIDTH, HEIGHT = 480, 210  # of a panel, in units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 22
ULP_HEIGHT = 120


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One kind of loss drawn: paths and marks (places on the x axis) in a panel of losses, distances below it."""

    curve: Curve
    reference: str
    candidate: str
    marks: list[float]
    bars: list[tuple[float, float]]
    not_numbers: list[float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    ulp_ticks: list[Tick]


def chart(curve: Curve) -> Chart:
    """Lay a curve out. A NaN leaves a gap in a line, and is listed among ``not_numbers`` in the panel of distances."""
    steps = (curve.first + curve.last) / 2
    x = _scale(steps[0] - 0.5, steps[-1] + 0.5, LEFT, WIDTH - RIGHT)
    losses = np.concatenate([curve.reference, curve.candidate])
    losses = losses[np.isfinite(losses)]
    low, high = (float(losses.min()), float(losses.max())) if len(losses) else (0.0, 1.0)
    margin = (high - low or abs(high) or 1.0) * 0.06
    y = _scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    heights, top = np.log10(1 + curve.ulp), max(1.0, _largest(np.log10(1 + curve.ulp)))
    up = _scale(0, top, ULP_HEIGHT - BOTTOM, TOP)
    bars = [(x(s), up(min(h, top))) for s, h in zip(steps, heights, strict=True) if h > 0]
    return Chart(
        curve,
        _path(x(steps), y(curve.reference)),
        _path(x(steps), y(curve.candidate)),
        [round(float(x(s)), 1) for s in steps[curve.differs]],
        [(round(float(a), 1), round(float(b), 1)) for a, b in bars],
        [round(float(x(s)), 1) for s in steps[np.isnan(heights)]],
        [Tick(float(x(t)), f"{t:g}") for t in _nice(steps[0], steps[-1], whole=True)],
        [Tick(float(y(t)), f"{t:g}") for t in _nice(low - margin, high + margin)],
        [Tick(float(up(np.log10(1 + 10.0**p))), f"1e{p}") for p in range(0, int(top) + 1, 1 + int(top) // 5)],
    )


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _largest(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else 0.0


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through the points, interrupted at NaN; a lone point is a dot."""
    words, pen = [], False
    for a, b in zip(x, y, strict=True):
        if np.isfinite(b):
            words.append(f"{'L' if pen else 'M'}{a:.1f} {b:.1f}" + ("" if pen else "h0"))
        pen = bool(np.isfinite(b))
    return "".join(words)


def _nice(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers within a range, about five."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(t) for t in ticks if low <= t <= high]
