"""Marks in Paddle's profile that say which op of the table an event belongs to.

The forward call of an op is one event. Its backward is what Paddle's autograd runs of the nodes that the call left in
the graph. Those that made its results say so when they run, through a hook on the result that changes no gradient. Of
the others, inside the op, only kinds and numbers are noted; :mod:`paddledsv4.observe.profile.trace` finds them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from typing import Any

import paddle
from paddle import Tensor
from paddle.profiler import RecordEvent

from paddledsv4.distributed.group import Group, Groups
from paddledsv4.observe.ops import OpCall, OpObserver, tensors_in

FORWARD, BACKWARD, COLLECTIVE, STEP = "forward", "backward", "collective", "step"
SEPARATOR = "\t"  # no op, path or group has one
COLLECTIVES = ("all_reduce_", "all_gather", "reduce_scatter", "all_to_all", "broadcast_", "barrier")


def mark(kind: str, name: str, where: str = "", number: str = "") -> RecordEvent:
    """An event that :mod:`paddledsv4.observe.profile.trace` understands."""
    return RecordEvent(SEPARATOR.join((kind, name, where, number)))


class OpMarks(OpObserver):
    """Marks every call that it is told of, and its backward.

    ``inner``: of the call with each number, how many nodes of autograd of each kind lie behind those that are marked.
    """

    def __init__(self) -> None:
        self.inner: list[Counter[str]] = []
        self._running: list[RecordEvent] = []
        self._nodes: dict[int, Any] = {}  # kept alive, so that no other node gets the same address

    def forget(self) -> None:
        """A new graph begins."""
        self._nodes.clear()

    def before(self, call: OpCall) -> None:
        self._running.append(mark(FORWARD, call.op, call.path))
        self._running[-1].begin()

    def after(self, call: OpCall, outputs: tuple) -> None:
        self._running.pop().end()
        if paddle.is_grad_enabled():
            self._mark_backward(call, [x for x in outputs if isinstance(x, Tensor) and not x.stop_gradient])

    def _mark_backward(self, call: OpCall, outputs: list[Tensor]) -> None:
        known = {node.node_ptr() for node in _makers(tensors_in([call.args, call.kwargs]))} | self._nodes.keys()
        made = {node.node_ptr(): node for node in _makers(outputs) if node.node_ptr() not in known}
        strike = mark(BACKWARD, call.op, call.path, str(len(self.inner)))
        for output in outputs:
            if output.grad_fn is not None and output.grad_fn.node_ptr() in made:
                output.register_hook(lambda gradient: _strike(strike))
        inside = _behind(made, known)
        self._nodes |= made | inside
        self.inner.append(Counter(node.name() for node in inside.values()))


def _makers(tensors: Iterable[Tensor]) -> list[Any]:
    return [x.grad_fn for x in tensors if x.grad_fn is not None]


def _behind(made: dict[int, Any], known: Collection[int]) -> dict[int, Any]:
    """The nodes that gradients reach from ``made`` before they come to known ones or to a parameter."""
    found, waiting = {}, list(made.values())
    while waiting:
        for node in filter(None, waiting.pop().next_functions):
            address = node.node_ptr()
            if not (address in known or address in made or address in found or node.name() == "GradNodeAccumulation"):
                found[address] = node
                waiting.append(node)
    return found


def _strike(event: RecordEvent) -> None:
    with event:
        pass


@contextlib.contextmanager
def marked_collectives(groups: Groups) -> Iterator[None]:
    """Every exchange of these groups is an event while the block runs."""
    there = {id(group): group for group in (getattr(groups, f.name) for f in fields(groups)) if group.size > 1}
    for group in there.values():
        for name in COLLECTIVES:
            setattr(group, name, _marked(group, name))
    try:
        yield
    finally:
        for group in there.values():
            for name in COLLECTIVES:
                delattr(group, name)


def _marked(group: Group, name: str):
    original = getattr(group, name)

    def exchange(*args, **kwargs):
        with mark(COLLECTIVE, name.rstrip("_"), group.name):
            return original(*args, **kwargs)

    return exchange
