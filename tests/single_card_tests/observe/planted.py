"""Numbers that are not finite, planted into one call of one op: in its result, or in what its backward gives."""

from __future__ import annotations

import math

import paddle
from paddle.autograd import PyLayer

from paddledsv4.observe.ops import as_tuple


class SpoiltGradient(PyLayer):
    """Passes numbers on; one element of the gradient becomes ``value``."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return spoilt(gradient, ctx.value)


def spoilt(x, value: float):
    """A copy with ``value`` for its last element."""
    flat = x.reshape([-1])
    last = paddle.arange(flat.shape[0]) == flat.shape[0] - 1
    return paddle.where(last, paddle.full_like(flat, value), flat).reshape(x.shape)


def layer_at(model, path: str):
    return dict(model.named_sublayers())[path] if path else model


def plant(
    model, path: str, op: str, call: int, direction: str, value: float = math.nan, index: int = 0, ever: bool = False
) -> None:
    """In call number ``call`` (from 1) of an op, spoil its result ``index``, or the gradient of argument ``index``;
    ``ever`` after that too."""
    ops = layer_at(model, path).ops
    function, count = getattr(ops, op), iter(range(1, 1_000_000))

    def planted(*args, **kwargs):
        number = next(count)
        if number != call and not (ever and number > call):
            return function(*args, **kwargs)
        if direction == "backward":
            args = [SpoiltGradient.apply(x, value) if i == index else x for i, x in enumerate(args)]
            return function(*args, **kwargs)
        outputs = function(*args, **kwargs)
        if outputs is None:  # in place
            paddle.assign(spoilt(args[index], value), args[index])
            return None
        changed = tuple(spoilt(x, value) if i == index else x for i, x in enumerate(as_tuple(outputs)))
        return changed if isinstance(outputs, tuple | list) else changed[0]

    setattr(ops, op, planted)
