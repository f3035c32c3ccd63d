"""Watch the ops that a model calls, from outside: which, in which layer, with what and with which result.

Every layer keeps its ops as attributes of ``layer.ops``. Watching replaces these attributes by a wrapper for the
length of a ``with`` block; without one nothing is wrapped, and nothing is slower. Several watchers may look at the
same op, and leave in any order::

    class Count(OpObserver):
        def after(self, call, outputs):
            print(call.path, call.op, len(outputs))

    with watch_ops(model, Count(), ops={"sinkhorn"}, layers="decoder.layers.2.*"):
        ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from paddle import Tensor, nn

from paddledsv4.numerics.rules import glob_matches


@dataclass(frozen=True, eq=False)
class OpCall:
    """One call of an op: ``function`` is the variant that the layer at ``path`` uses; "" is the model itself.

    Arguments are the ones of the call, not copies: an observer that keeps them keeps their memory and their graph.
    """

    op: str
    path: str
    function: Callable
    args: tuple
    kwargs: dict[str, Any]

    @property
    def where(self) -> str:
        """The op and the layer that calls it, for people."""
        return f"{self.path or 'model'}: {self.op}"


class OpObserver:
    """Told of every watched call, in the order of the forward pass. It must not change what it sees."""

    def before(self, call: OpCall) -> None:
        """The op is about to run."""

    def after(self, call: OpCall, outputs: tuple) -> None:
        """The op returned ``outputs``: one element for a single result, none from an op that works in place."""


class _Watched:
    """The attribute of ``layer.ops`` while somebody watches it."""

    def __init__(self, op: str, path: str, function: Callable):
        self.op, self.path, self.function = op, path, function
        self.observers: list[OpObserver] = []

    def __call__(self, *args, **kwargs):
        call = OpCall(self.op, self.path, self.function, args, kwargs)
        for observer in self.observers:
            observer.before(call)
        outputs = self.function(*args, **kwargs)
        for observer in self.observers:
            observer.after(call, as_tuple(outputs))
        return outputs


@contextlib.contextmanager
def watch_ops(
    model: nn.Layer, observer: OpObserver, ops: Collection[str] | None = None, layers: str | None = None
) -> Iterator[None]:
    """Tell ``observer`` of the calls that the model and its layers make in this block.

    Args:
        ops: names of the ops to watch; None watches all.
        layers: a glob over the paths of layers, as in ``numerics.layers`` of a recipe; None watches all of them and
            the model itself, whose ops are those of the losses and of the optimizer.
    """
    watched = [(space, name, _watch(space, name, path, observer))
               for path, space in _tables(model) if layers is None or glob_matches(layers, path)
               for name in list(vars(space)) if ops is None or name in ops]
    try:
        yield
    finally:
        for space, name, wrapper in watched:
            wrapper.observers.remove(observer)
            if not wrapper.observers and getattr(space, name) is wrapper:
                setattr(space, name, wrapper.function)


def _tables(model: nn.Layer) -> Iterator[tuple[str, Any]]:
    for path, layer in [("", model), *model.named_sublayers()]:
        if hasattr(layer, "ops"):
            yield path, layer.ops


def _watch(space: Any, name: str, path: str, observer: OpObserver) -> _Watched:
    there = getattr(space, name)
    wrapper = there if isinstance(there, _Watched) else _Watched(name, path, there)
    wrapper.observers.append(observer)
    setattr(space, name, wrapper)
    return wrapper


def as_tuple(outputs: Any) -> tuple:
    """What an op returned as a tuple; nothing for one that works in place."""
    if outputs is None:
        return ()
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, in order; lists, tuples and the values of mappings opened."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [t for value in values for t in tensors_in(value)] if isinstance(values, list | tuple) else []
