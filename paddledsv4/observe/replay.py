"""One call of an op on its own: kept as copies, and run again with any variant, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor

from paddledsv4.observe.ops import as_tuple, tensors_in


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


def copied_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same keywords with copied tensors."""
    return {name: copied(value) for name, value in kwargs.items()}


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
