"""Record the tensors of one pass under the names of a reference trace, from outside the model.

Two kinds of taps: results (or arguments) of a layer, through Paddle's forward hooks; and of an op that a layer
calls, by wrapping it in that layer's table of ops (paddledsv4/weights/names.py says which). The model computes the
same bits with a tracer attached.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor, nn

from paddledsv4.weights.names import traced


@dataclass(frozen=True)
class Tap:
    """A tensor to record: ``name`` in the trace, from the layer at ``layer`` (its path) or from the op it calls.

    ``pick`` takes ("in" or "out", position) of the layer's or op's arguments or results.
    """

    name: str
    layer: str
    pick: tuple[str, int] = ("out", 0)
    op: str | None = None


def taps_of(model: nn.Layer) -> list[Tap]:
    """Every tap of a DeepseekV4Model, under the names of a reference trace."""
    config = model.config
    rows = traced(config.num_hidden_layers, config.num_nextn_predict_layers)
    places = ((row.name, row.paddle) for row in rows if row.paddle)
    return [Tap(name, at.layer, (at.side, at.position), at.call) for name, at in places]


def _sequence(x) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


class Tracer:
    """Context manager that records into ``forward`` and ``gradients``, both name -> numpy array.

    A tap that fires again in the same pass gets ``#2``, ``#3`` behind its name. ``names`` (a regular expression)
    limits what is recorded.
    """

    def __init__(self, model: nn.Layer, names: str = ""):
        self.model, self.wanted = model, re.compile(names)
        self.forward: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._calls: Counter = Counter()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Tracer:
        layers = dict(self.model.named_sublayers())
        for tap in taps_of(self.model):
            if tap.layer in layers and self.wanted.search(tap.name):
                (self._tap_op if tap.op else self._tap_layer)(layers[tap.layer], tap)
        return self

    def __exit__(self, *exception) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _tap_layer(self, layer: nn.Layer, tap: Tap) -> None:
        side, position = tap.pick

        def hook(_, inputs, outputs):
            self._record(tap.name, _sequence(inputs if side == "in" else outputs)[position])

        handle = layer.register_forward_post_hook(hook)
        self._undo.append(handle.remove)

    def _tap_op(self, layer: nn.Layer, tap: Tap) -> None:
        side, position = tap.pick
        original = getattr(layer.ops, tap.op)

        def recording(*args, **kwargs):
            outputs = original(*args, **kwargs)
            self._record(tap.name, _sequence(args if side == "in" else outputs)[position])
            return outputs

        setattr(layer.ops, tap.op, recording)
        self._undo.append(lambda: setattr(layer.ops, tap.op, original))

    def _record(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        self._calls[name] += 1
        if self._calls[name] > 1:
            name = f"{name}#{self._calls[name]}"
        self.forward[name] = tensor.detach().numpy()
        if not tensor.stop_gradient and paddle.is_grad_enabled():
            tensor.register_hook(lambda gradient: self._keep(name, gradient))

    def _keep(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = gradient.numpy()
