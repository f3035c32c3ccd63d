"""Paddle's profile as a Chrome trace, for chrome://tracing and Perfetto, with the ops of our table in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paddledsv4.errors import UserError
from paddledsv4.observe.profile.marks import BACKWARD, COLLECTIVE, FORWARD, SEPARATOR, STEP

Event = dict[str, Any]
OURS = {FORWARD: "layer", COLLECTIVE: "group", STEP: "step"}  # and what the place of such a mark is called
WITHIN = ("OperatorInner", "DygraphKernelLaunch", "UserDefined")  # parts of one Paddle op, three quarters of all events
OPERATOR = " dygraph"  # Paddle's suffix of one of its ops, which has nothing inside but such parts
NODE = "Global_"  # Paddle's prefix of the events of nodes of autograd


def chrome_events(roots: dict[int, Any], inner: list[Counter[str]], rank: int) -> list[Event]:
    """What ``paddle.profiler`` recorded, thread -> tree, as complete events in microseconds; the process is the rank.

    A node of autograd that ran for an op gets an event of the op around it. ``inner`` is that of the ``OpMarks``.
    """
    events: list[Event] = [_named("process_name", rank, 0, f"rank {rank}")]
    for number, (_, root) in enumerate(sorted(roots.items())):
        events.append(_named("thread_name", rank, number, "main" if number == 0 else f"thread {number}"))
        owners = _Owners(inner)
        for child in root.children_node:
            events += _events(child, owners, {"ph": "X", "pid": rank, "tid": number})
    return events


def _events(node: Any, owners: _Owners, thread: Event) -> Iterator[Event]:
    name = node.name
    kind, *rest = name.split(SEPARATOR)
    if rest and kind == BACKWARD:
        return
    event = thread | {"ts": node.start_ns / 1000, "dur": (node.end_ns - node.start_ns) / 1000}
    if kind.startswith(NODE) and (owner := owners.of(node)):
        yield event | {"name": owner[0], "cat": BACKWARD, "args": {"layer": owner[1]}}
    if rest and kind in OURS:
        owners.forget()
        yield event | {"name": rest[0], "cat": kind} | ({"args": {OURS[kind]: rest[1]}} if rest[1] else {})
    elif (category := str(node.type).rpartition(".")[2]) not in WITHIN:
        yield event | {"name": name, "cat": category}
        if name.endswith(OPERATOR):
            return
    for child in node.children_node:
        yield from _events(child, owners, thread)


class _Owners:
    """The op call that each node of autograd belongs to, asked for in the order in which nodes ran.

    Unmarked nodes belong to the call that was marked last of those that still miss a node of their kind. Where ops run
    side by side and have such a node each, the two may be mistaken for one another.
    """

    def __init__(self, inner: list[Counter[str]]):
        self.inner = inner
        self.forget()

    def forget(self) -> None:
        """Another backward pass comes."""
        self._missing: dict[int, tuple[list[str], Counter[str]]] = {}

    def of(self, node: Any) -> list[str] | None:
        """[op, layer], or None for what lies between ops."""
        if found := _mark_in(node):
            *owner, number = found
            if int(number) not in self._missing:
                self._missing[int(number)] = owner, Counter(self.inner[int(number)])
            return owner
        kind = node.name.removeprefix(NODE)
        for owner, missing in reversed(self._missing.values()):
            if missing[kind]:
                missing[kind] -= 1
                return owner
        return None


def _mark_in(node: Any) -> list[str] | None:
    """[op, layer, number] of the mark inside a node of autograd, looked for down to the next such node."""
    for child in node.children_node:
        kind, *rest = child.name.split(SEPARATOR)
        if rest and kind == BACKWARD:
            return rest
        if not child.name.startswith(NODE) and (found := _mark_in(child)):
            return found
    return None


def _named(what: str, rank: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}}


def write_trace(path: Path, events: list[Event]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_trace(path: Path) -> list[Event]:
    """The events of a trace that :func:`write_trace` wrote.

    Raises:
        UserError: the file cannot be read or is something else.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        whole = [event for event in events if event["ph"] == "X"]
        if not any(event["cat"] == STEP for event in whole):
            raise ValueError
        for event in whole:
            float(event["ts"]), float(event["dur"]), str(event["name"]), int(event["tid"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is not a profile; paddledsv4 train --profile-steps 5:8 leaves some") from None
    return whole
