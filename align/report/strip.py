"""The heat strip: how many float32 steps each op of each layer is from the reference, one strip per direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.report.inputs import Distance

BOUNDS = (1, 8, 64, 1024, 65536)  # the darker classes begin here


@dataclass(frozen=True)
class Cell:
    """``level`` is 0 (equal) to 5, or "nan"; ``text`` says the same without colour."""

    level: int | str
    text: str
    title: str


@dataclass(frozen=True)
class Strip:
    """Rows are ops, columns are layers, both in the order of their first appearance."""

    direction: str
    layers: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def strips(distances: list[Distance]) -> list[Strip]:
    """One strip for every direction that has rows."""
    found = []
    for direction in ("forward", "backward", "optimizer"):
        here = [row for row in distances if row.direction == direction]
        if not here:
            continue
        layers, ops = (list(dict.fromkeys(getattr(row, name) for row in here)) for name in ("layer", "op"))
        cells: dict[tuple[str, str], Distance] = {}
        for row in here:
            key = row.op, row.layer
            cells[key] = max(cells.get(key, row), row, key=_rank)
        rows = [(op, [_cell(cells.get((op, layer))) for layer in layers]) for op in ops]
        found.append(Strip(direction, layers, rows))
    return found


def short(layer: str) -> str:
    """A layer's name for the head of a narrow column: ``decoder.layers.3`` is 3, ``mtp.layers.0`` is mtp 0."""
    parts = [part for part in layer.split(".") if part not in ("decoder", "layers", "mtp_model_layer")]
    return " ".join(parts) or layer


def _rank(row: Distance) -> tuple[bool, float]:
    worst = row.max_ulp is None or math.isnan(row.max_ulp)
    return not row.equal, math.inf if worst and not row.equal else (0.0 if worst else row.max_ulp)


def _cell(row: Distance | None) -> Cell | None:
    if row is None:
        return None
    where = f"{row.layer} {row.op} {row.direction}"
    if row.equal:
        return Cell(0, "=", f"{where}: equal bits")
    if row.max_ulp is None or math.isnan(row.max_ulp):
        return Cell("nan", "NaN", f"{where}: different, no distance (NaN)")
    level = max(1, sum(row.max_ulp >= bound for bound in BOUNDS))
    return Cell(level, _brief(row.max_ulp), f"{where}: up to {row.max_ulp:,.0f} ULP")


def _brief(ulp: float) -> str:
    """At most four characters."""
    if math.isinf(ulp):
        return "inf"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if ulp >= size:
            return f"{ulp / size:.0f}{unit}"
    return f"{ulp:.0f}"
