"""How long each op took, from a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from paddledsv4.observe.profile.marks import BACKWARD, COLLECTIVE, FORWARD, STEP
from paddledsv4.observe.profile.trace import Event


@dataclass
class OpTime:
    """Of all calls of an op: their number, and milliseconds forward and backward, without ops that ran inside."""

    name: str
    calls: int = 0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class OpTimes:
    """Longest first; ``steps`` took ``milliseconds`` together."""

    ops: list[OpTime]
    steps: int
    milliseconds: float

    @property
    def between(self) -> float:
        """Milliseconds outside of all ops."""
        return self.milliseconds - sum(op.total for op in self.ops)


def op_times(events: list[Event]) -> OpTimes:
    """Add up the ops and exchanges of a trace (:func:`paddledsv4.observe.profile.trace.read_trace`)."""
    ops: defaultdict[str, OpTime] = defaultdict(lambda: OpTime(""))
    steps = [event for event in events if event["cat"] == STEP]
    for event, milliseconds in _own_times(events):
        group = event["args"]["group"] if event["cat"] == COLLECTIVE else ""
        op = ops[f"{event['name']} ({group})" if group else event["name"]]
        if event["cat"] == BACKWARD:
            op.backward += milliseconds
        else:
            op.calls += 1
            op.forward += milliseconds
    for name, op in ops.items():
        op.name = name
    ordered = sorted(ops.values(), key=lambda op: -op.total)
    return OpTimes(ordered, len(steps), sum(step["dur"] for step in steps) / 1e3)


def _own_times(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """Ops and exchanges with the milliseconds that they did not spend in another one."""
    ours = [event for event in events if event["cat"] in (FORWARD, BACKWARD, COLLECTIVE)]
    own = [event["dur"] for event in ours]
    open_: list[int] = []
    for i in sorted(range(len(ours)), key=lambda i: (ours[i]["tid"], ours[i]["ts"], -ours[i]["dur"])):
        while open_ and not _inside(ours[i], ours[open_[-1]]):
            open_.pop()
        if open_:
            own[open_[-1]] -= ours[i]["dur"]
        open_.append(i)
    return ((event, max(duration, 0.0) / 1e3) for event, duration in zip(ours, own, strict=True))


def _inside(event: Event, outer: Event) -> bool:
    return event["tid"] == outer["tid"] and event["ts"] < outer["ts"] + outer["dur"]


def as_table(times: OpTimes, title: str) -> Table:
    """For people: longest first."""
    per_step = f"{times.milliseconds / times.steps:,.1f} ms a step"
    steps = f"{times.steps} step{'s' if times.steps > 1 else ''}"
    table = Table(title=f"{title}: milliseconds of {steps}, {per_step}")
    table.add_column("op", no_wrap=True, min_width=max((len(op.name) for op in times.ops), default=0))
    for heading in ("calls", "forward", "backward", "total", "share", "mean"):
        table.add_column(heading, justify="right")
    for op in times.ops:
        share, mean = op.total / times.milliseconds, op.total / max(op.calls, 1)
        numbers = (f"{op.forward:,.1f}", f"{op.backward:,.1f}", f"{op.total:,.1f}", f"{share:.1%}", f"{mean:,.3f}")
        table.add_row(op.name, f"{op.calls:,}", *numbers)
    table.add_section()
    between = (f"{times.between:,.1f}", f"{times.between / times.milliseconds:.1%}", "")
    table.add_row("between ops", "", "", "", *between)
    return table
