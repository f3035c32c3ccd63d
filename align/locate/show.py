"""What ``align locate`` found, as text and as JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.locate.distance import MARGIN
from align.locate.run import Located
from align.locate.trace_check import TraceCheck

OTHERS = 5  # further faults to list
PLACES = {"result": "result", "gradient": "gradient of input", "arrival": "gradient arriving at result"}
OF_THE_OP = ("result", "gradient")
LINES = 15  # ops to list, worst first


def verdict(found: Located) -> str:
    """One line that says it all."""
    first = found.first
    if first is None:
        equal = sum(e.verdict == "identical" for e in found.events)
        return f"no fault: {equal} of {len(found.events)} comparisons identical, the others within the noise"
    blame = "the op" if first.what in OF_THE_OP else "the code around the op"
    place = f", {PLACES[first.what]} {first.index}" if first.what in PLACES else ""
    return f"first fault: step {first.step}, {first.where}{place}: {first.verdict} ({blame})"


def trace_line(check: TraceCheck | None, preset: str) -> str:
    """What the bundle's own tensors say of the reference."""
    if check is None:
        return f"the bundle has no trace: the reference is the {preset} preset as it runs here"
    line = f"{preset} preset against the bundle's trace: {check.equal} of {check.compared} tensors equal"
    return line if check.first is None else f"{line}; first different: {check.first} (made by {check.site})"


def show(found: Located, console: Console) -> None:
    """Verdict, worst op by op, further faults."""
    console.print(Text(verdict(found)), soft_wrap=True)
    worst: dict[tuple[str, str], list] = defaultdict(list)
    for event in found.events:
        if event.what in ("result", "gradient"):
            worst[event.op, event.what].append(event)
    table = Table("op", "", title=f"error over the noise of legal computations; a fault above {MARGIN:g}")
    for heading in ("compared", "identical", "largest", "where"):
        table.add_column(heading, justify="left" if heading == "where" else "right")
    for (op, what), events in sorted(worst.items(), key=lambda item: -max(e.excess for e in item[1])):
        top = max(events, key=lambda e: e.excess)
        identical = sum(e.verdict == "identical" for e in events)
        if identical < len(events) and table.row_count < LINES:
            style = "bold red" if any(e.fault for e in events) else ""
            direction = "forward" if what == "result" else "backward"
            cells = op, direction, str(len(events)), str(identical), f"{top.excess:.2g}", top.path or "model"
            table.add_row(*(Text(cell) for cell in cells), style=style)
    if table.row_count:
        console.print(table)
    for event in found.faults[1 : 1 + OTHERS]:
        console.print(Text(f"also: step {event.step}, {event.where}: {event.verdict}"), soft_wrap=True)
    if len(found.faults) > 1 + OTHERS:
        console.print(f"and {len(found.faults) - 1 - OTHERS} more faults")


def as_dict(found: Located, check: TraceCheck | None) -> dict[str, Any]:
    """For locate.json: the verdict, the first fault, the trace check, and the rows of the report's heat strip."""
    first = found.first
    fault = first and {
        "step": first.step, "layer": first.path, "op": first.op, "what": first.what, "index": str(first.index),
        "verdict": first.verdict,
    }  # fmt: skip
    return {
        "verdict": verdict(found), "first": fault, "faults": len(found.faults), "rows": found.rows(),
        "trace": check and {"equal": check.equal, "compared": check.compared, "first": check.first, "site": check.site},
    }
