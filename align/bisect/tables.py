"""A bisection's tables, for a terminal."""

from __future__ import annotations

import math

from rich.table import Table

from align.bisect.result import Flip, Result


def tables(result: Result) -> list[Table]:
    """The switches, and the layers where they were asked for; those without rows are left out."""
    found = []
    if result.flips:
        found.append(_table("All switches flipped but this one", result.flips, result))
    if result.layer_flips:
        found.append(_table("All switches flipped but this one in this layer", result.layer_flips, result))
    return found


def _table(title: str, flips: list[Flip], result: Result) -> Table:
    layered = any(flip.layer for flip in flips)
    table = Table(title=title, caption_justify="left")
    for heading in ("switch", "layer") if layered else ("switch", "from", "to"):
        table.add_column(heading, no_wrap=True)
    for figure in ("losses differ from step", "weights differ from step", "max loss difference", "CPU s per step"):
        table.add_column(figure, justify="right")
    table.add_column("needed")
    minimal = result.minimal or []
    for flip in sorted(flips, key=lambda flip: not flip.layer and flip.name not in minimal):
        cells = [flip.name, *([flip.layer] if layered else flip.choices), *_figures(flip)]
        needed = flip.name in minimal and not flip.outcome.same(result.after.weights)
        table.add_row(*cells, "yes" if needed else "", style="bold" if needed else None)
    table.caption = "CPU s per step: what --to costs more than --from at this switch"
    return table


def _figures(flip: Flip) -> list[str]:
    outcome, difference = flip.outcome, flip.outcome.max_difference
    if outcome.error:
        return ["fails", "-", outcome.error, "-"]
    if difference is None:
        shown = "-"
    else:
        shown = "NaN" if math.isnan(difference) else f"{difference:.3g}"
    seconds = "-" if flip.seconds is None else f"{flip.seconds:+.2f}"
    return ["-" if outcome.equal else str(outcome.first_step or "?"), str(flip.weights_step or "-"), shown, seconds]
