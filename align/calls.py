"""Record the calls of ops during a training step, from outside the model, and replay them with other variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor, nn


@dataclass
class Call:
    """One call of an op: copies of its arguments, and of the gradient that every output received (None: none)."""

    op: str
    path: str
    args: list[Any]
    kwargs: dict[str, Any]
    in_graph: bool
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def keep_gradient(self, output: int, gradient: Tensor | None) -> None:
        """Keep a copy; Paddle also reports outputs that got no gradient, as None."""
        if gradient is not None:
            self.gradients[output] = gradient.detach().clone()


def copied(value: Any) -> Any:
    """Tensors as independent leaves that want a gradient when the original did; lists element by element."""
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    copy.stop_gradient = value.stop_gradient
    return copy


def as_tuple(outputs: Any) -> tuple:
    """Outputs of an op as a tuple; none for an op that works in place."""
    if outputs is None:
        return ()
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


class CallRecorder:
    """Context manager that records every call of an op that ``model`` or one of its layers makes, in order.

    ``ops`` limits which. The model computes the same bits with a recorder attached.
    """

    def __init__(self, model: nn.Layer, ops: set[str] | None = None):
        self.model, self.wanted = model, ops
        self.calls: list[Call] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> CallRecorder:
        for path, layer in [("", self.model), *self.model.named_sublayers()]:
            for name in vars(getattr(layer, "ops", None) or object) if hasattr(layer, "ops") else ():
                if self.wanted is None or name in self.wanted:
                    self._wrap(layer, path, name)
        return self

    def __exit__(self, *exception) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrap(self, layer: nn.Layer, path: str, name: str) -> None:
        original = getattr(layer.ops, name)

        def recording(*args, **kwargs):
            call = Call(name, path, copied(list(args)), copied_values(kwargs), paddle.is_grad_enabled())
            self.calls.append(call)
            outputs = original(*args, **kwargs)
            for i, x in enumerate(as_tuple(outputs)):
                again = any(x is earlier for earlier in as_tuple(outputs)[:i])  # one tensor's gradient is told once
                if isinstance(x, Tensor) and not x.stop_gradient and call.in_graph and not again:
                    x.register_hook(lambda g, i=i: call.keep_gradient(i, g))
            return outputs

        setattr(layer.ops, name, recording)
        self._undo.append(lambda: setattr(layer.ops, name, original))


def copied_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same keywords with copied tensors."""
    return {name: copied(value) for name, value in kwargs.items()}


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, in order, lists opened."""
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in tensors_in(v)] if isinstance(values, list | tuple) else []


def replay(call: Call, function: Callable) -> tuple[list[Any], list[Tensor | None]]:
    """Run ``function`` on the recorded arguments and gradients.

    Returns:
        Outputs, and the gradient of every tensor argument that wants one. An op that works in place gives the
        arguments that it changed as its outputs.
    """
    args, kwargs = copied(call.args), copied_values(call.kwargs)
    with paddle.set_grad_enabled(call.in_graph):
        outputs = as_tuple(function(*args, **kwargs))
    if not outputs:
        return tensors_in(args), []
    inputs = [t for t in tensors_in([args, list(kwargs.values())]) if not t.stop_gradient]
    if not backward(call, outputs):
        return list(outputs), []
    return list(outputs), [t.grad for t in inputs]


def backward(call: Call, outputs: tuple) -> bool:
    """Send the recorded gradients back from ``outputs``; False if there are none to send.

    A variant may give one tensor as several outputs: it then receives the sum, the last output's gradient first.
    """
    received: dict[int, tuple[Tensor, Tensor]] = {}
    for i in sorted(call.gradients, reverse=True):
        if not outputs[i].stop_gradient:
            earlier = received.get(id(outputs[i]))
            gradient = call.gradients[i] if earlier is None else earlier[1] + call.gradients[i]
            received[id(outputs[i])] = (outputs[i], gradient)
    if received:
        tensors, gradients = zip(*received.values(), strict=True)
        paddle.autograd.backward(list(tensors), list(gradients))
    return bool(received)
