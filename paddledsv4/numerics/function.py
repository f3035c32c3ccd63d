"""Ops with a hand-written backward, forward and backward in one place.

A function decorated with :func:`differentiable` returns its output(s) and a ``backward`` closure. The closure
receives one gradient per output and returns one gradient (or None) per tensor argument, in their order::

    @differentiable
    def scale(x, factor):
        def backward(dy):
            return (dy * factor,)
        return x * factor, backward
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer


class _Function(PyLayer):
    @staticmethod
    def forward(ctx, function, kwargs, *args):
        # Detached arguments and results: the closure then holds numbers only, never the graph that owns it.
        ctx.wanted = [not a.stop_gradient for a in args if isinstance(a, Tensor)]
        plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
        output, ctx.closure = function(*plain, **kwargs)
        if isinstance(output, tuple):
            return tuple(t.detach() for t in output)
        return output.detach()

    @staticmethod
    def backward(ctx, *grads):
        closure, ctx.closure = ctx.closure, None
        results = closure(*grads)
        if len(results) != len(ctx.wanted):
            raise RuntimeError(f"backward gave {len(results)} gradients for {len(ctx.wanted)} tensors")
        # Paddle refuses a gradient for an input that wants none.
        kept = [g if wanted else None for g, wanted in zip(results, ctx.wanted, strict=True)]
        return tuple(kept) if len(kept) > 1 else kept[0]


def differentiable(function: Callable) -> Callable:
    """Make ``function(*args, **static) -> (outputs, backward)`` an op that Paddle's autograd can use.

    Positional arguments may be tensors, None or plain values; keyword arguments are static. When no gradient is
    asked for, nothing is kept.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        wanted = any(isinstance(a, Tensor) and not a.stop_gradient for a in args)
        if not (wanted and paddle.is_grad_enabled()):
            with paddle.no_grad():
                return function(*args, **kwargs)[0]
        outputs = _Function.apply(function, kwargs, *args)
        for x in outputs if isinstance(outputs, tuple) else (outputs,):
            if not x.is_floating_point():
                x.stop_gradient = True
        return outputs

    call.forward_and_backward = function
    return call
