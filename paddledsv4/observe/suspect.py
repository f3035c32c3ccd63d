"""A call of an op that may have given a number that is not finite: kept whole, tried again, put in words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.observe.finite import described, is_finite, kind
from paddledsv4.observe.known import known_ops
from paddledsv4.observe.ops import OpCall, tensors_in
from paddledsv4.observe.replay import Call, copied, copied_values, replay

Names = Mapping[int, str]  # id of a tensor -> the parameter, buffer or gradient that it is


@dataclass
class Suspect:
    """A copy of a call, the function that ran, and what was found, in words.

    ``bad`` is the result (forward) or the gradient of an input (backward) that is not finite, ``index`` which one.
    """

    call: Call
    function: Any
    direction: str
    index: int
    bad: Any
    text: str
    innocent: bool = False  # what it got was not finite already

    def repeats(self) -> bool | None:
        """Whether the call alone gives numbers that are not finite again; None if it needs other ranks."""
        if self.ranks > 1:
            return None
        outputs, gradients = replay(self.call, self.function)
        results = outputs if self.direction == "forward" else gradients
        return not all(is_finite(x) for x in results)

    @property
    def ranks(self) -> int:
        """How many ranks the op exchanges tensors with, itself included."""
        bound = self.function if isinstance(self.function, functools.partial) else functools.partial(self.function)
        values = [*bound.args, *bound.keywords.values(), *self.call.args, *self.call.kwargs.values()]
        return max((x.size for x in values if isinstance(x, Group)), default=1)


def kept(call: OpCall, in_graph: bool, arrived: Mapping[int, Tensor] | None = None) -> Call:
    """A copy of a call that later steps cannot change."""
    return Call(call.op, call.path, copied(list(call.args)), copied_values(call.kwargs), in_graph, dict(arrived or {}))


def forward_suspect(call: OpCall, before: Call | None, in_graph: bool, index: int, bad: Any, names: Names) -> Suspect:
    """Result ``index`` of a call is not finite; ``before``: a copy from before the op worked in place, if it does."""
    given = first_bad_argument(call, before.args if before else list(call.args), names)
    if given:
        text = f"{call.where} was given {given}"
    else:
        text = f"{call.where} gave {result_name(call.op, index)}, {kind(bad)}: {described(bad)}; "
        text += "its arguments are finite"
    copy = before or kept(replace(call, args=tuple(map(_only_bad, call.args))) if given else call, in_graph)
    return Suspect(copy, call.function, "forward", index, copied(bad), text, innocent=bool(given))


def _only_bad(argument: Any) -> Any:
    """Of a list, such as that of all gradients, what is not finite: enough to show where it comes from."""
    bad = [x for x in argument if not is_finite(x)] if isinstance(argument, list) else None
    return bad or argument


def backward_suspect(
    call: OpCall, arrived: Mapping[int, Tensor], index: int, bad: Tensor, names: Names, tensor: Tensor
) -> Suspect:
    """The gradient of input ``index`` of a call is not finite; all that ``arrived`` at its results were."""
    what = names.get(id(tensor)) or next((n for n, t in arguments(call) if t is tensor), f"input {index}")
    text = f"backward of {call.where} gave the gradient of {what}, {kind(bad)}: {described(bad)}; "
    text += "those it received are finite"
    return Suspect(kept(call, True, arrived), call.function, "backward", index, copied(bad), text)


def first_bad_argument(call: OpCall, before: list[Any], names: Names) -> str | None:
    """In words, the first argument that was not finite ``before`` the op ran."""
    values = arguments(replace(call, args=tuple(before)))
    for (name, tensor), (_, value) in zip(arguments(call), values, strict=True):
        if not is_finite(value):
            return f"{names.get(id(tensor), name)}, {kind(value)}: {described(value)}"
    return None


def arguments(call: OpCall) -> list[tuple[str, Any]]:
    """(name, value) of every argument, lists element by element: "x", "gradients[3]"."""
    found = []
    for name, value in [*zip(_names(call), call.args, strict=False), *call.kwargs.items()]:
        parts = value if isinstance(value, list | tuple) else None
        found += [(name, value)] if parts is None else [(f"{name}[{i}]", part) for i, part in enumerate(parts)]
    return found


def _names(call: OpCall) -> list[str]:
    """The op's own names of its positional arguments, which all its variants share."""
    names = _parameters(call.op)
    return [*names, *(f"argument {i}" for i in range(len(names), len(call.args)))]


@functools.cache
def _parameters(op: str) -> list[str]:
    variant = known_ops()[op].variants.get("paddle") if op in known_ops() else None
    return list(inspect.signature(variant.function).parameters) if variant else []


def result_name(op: str, index: int) -> str:
    """What the table of ops calls a result."""
    names = known_ops()[op].outputs if op in known_ops() else ()
    return names[min(index, len(names) - 1)] if names else f"its argument {index}, which it changes"


def results(call: OpCall, outputs: tuple) -> tuple:
    """What an op gave: its outputs, or the tensors that it changed in place."""
    return outputs or tuple(tensors_in(call.args))


def in_place(op: str) -> bool:
    """Whether the table says that an op gives nothing but changes its arguments."""
    return op in known_ops() and known_ops()[op].outputs == ()

