"""Record the calls of ops during a training step, from outside the model."""

from __future__ import annotations

import contextlib

import paddle
from paddle import Tensor, nn

from paddledsv4.numerics.registry import load_all
from paddledsv4.observe.ops import OpCall, OpObserver, watch_ops
from paddledsv4.observe.replay import Call, copied, copied_values


class CallRecorder(OpObserver):
    """Context manager that records every call of an op that ``model`` or one of its layers makes, in order.

    ``ops`` limits which, to those of the table in any case. The model computes the same bits with a recorder attached.
    """

    def __init__(self, model: nn.Layer, ops: set[str] | None = None):
        self.calls: list[Call] = []
        self._watching = watch_ops(model, self, set(load_all()) if ops is None else ops)
        self._stack = contextlib.ExitStack()
        self._running: list[Call] = []  # an adapter in the place of an op calls ops itself

    def __enter__(self) -> CallRecorder:
        self._stack.enter_context(self._watching)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def before(self, call: OpCall) -> None:
        args, kwargs = copied(list(call.args)), copied_values(call.kwargs)
        self._running.append(Call(call.op, call.path, args, kwargs, paddle.is_grad_enabled()))
        self.calls.append(self._running[-1])

    def after(self, call: OpCall, outputs: tuple) -> None:
        copy = self._running.pop()
        for i, x in enumerate(outputs):
            again = any(x is earlier for earlier in outputs[:i])  # one tensor's gradient is told once
            if isinstance(x, Tensor) and not x.stop_gradient and copy.in_graph and not again:
                x.register_hook(lambda g, i=i: copy.keep_gradient(i, g))
