"""What gauges have in common: one quantity of every layer of a kind, over one step and all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import paddle
from paddle import nn

from paddledsv4.distributed.group import Group, Groups
from paddledsv4.observe.ops import OpCall

PARTS = (".mlp.router", ".self_attention.core_attention", ".self_attention_hyper_connection", ".mlp_hyper_connection")


class Gauge:
    """Watches ``op`` of the layers of class ``layer`` during a step, or only looks at these layers when it is over.

    All ranks have the same gauges, and :meth:`values` is called on all of them.
    """

    layer: ClassVar[type]
    op: ClassVar[str] = ""

    def __init__(self, model: nn.Layer, groups: Groups):
        self.groups = groups
        self.layers = {path: layer for path, layer in model.named_sublayers() if self.watches(layer)}

    def watches(self, layer: nn.Layer) -> bool:
        """Whether this layer has the quantity."""
        return isinstance(layer, self.layer)

    def begin(self) -> None:
        """A step begins."""

    def see(self, call: OpCall, outputs: tuple) -> None:
        """``op`` ran in one of the layers, in a forward pass that will be differentiated."""

    def values(self) -> dict[str, float]:
        """Tag -> number, of the step as a whole; every rank gets the same."""
        raise NotImplementedError

    def named(self, group: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """{path: {quantity: number}} -> {"group/quantity/layer": number}."""
        return {
            f"{group}/{name}/{layer_of(path)}": float(x) for path, named in values.items() for name, x in named.items()
        }


def layer_of(path: str) -> str:
    """The transformer layer that a part of one belongs to: "decoder.layers.2.mlp.router" -> "decoder.layers.2"."""
    for part in PARTS:
        path = path.removesuffix(part)
    return path.removesuffix(".mtp_model_layer")


def reduced(group: Group, arrays: Mapping[str, np.ndarray], op: str = "sum") -> dict[str, np.ndarray]:
    """The sum (or "max") of every array over the ranks of the group, which all have the same names and shapes."""
    if group.size == 1 or not arrays:
        return dict(arrays)
    together = paddle.to_tensor(np.concatenate([x.ravel() for x in arrays.values()]).astype(np.float64))
    pieces = np.split(group.all_reduce_(together, op).numpy(), np.cumsum([x.size for x in arrays.values()])[:-1])
    return {name: piece.reshape(x.shape) for (name, x), piece in zip(arrays.items(), pieces, strict=True)}
