"""How far the mixing matrices of the hyper-connections are from doubly stochastic."""

from __future__ import annotations

import numpy as np
from paddle import Tensor

from paddledsv4.observe.metrics.gauge import Gauge, layer_of, reduced
from paddledsv4.observe.ops import OpCall
from paddledsv4.ops.precision import widen
from paddledsv4.transformer.hyper_connection import HyperConnection


def sum_errors(h_res: Tensor) -> np.ndarray:
    """h_res [..., n, n] (last dimension: columns) -> [2]: the largest |sum - 1| of any row, and of any column."""
    h = widen(h_res.detach())
    return np.array([float((h.sum(axis) - 1).abs().max()) for axis in (-1, -2)])


class MixingError(Gauge):
    """The worst sums of a step in each transformer layer, whose two hyper-connections count together."""

    layer, op = HyperConnection, "sinkhorn"

    def begin(self) -> None:
        self.worst = {path: np.zeros(2) for path in self.layers}

    def see(self, call: OpCall, outputs: tuple) -> None:
        self.worst[call.path] = np.maximum(self.worst[call.path], sum_errors(outputs[0]))  # keeps NaN

    def values(self) -> dict[str, float]:
        layers: dict[str, np.ndarray] = {}
        for path, errors in reduced(self.groups.world, self.worst, "max").items():
            layers[layer_of(path)] = np.maximum(layers.get(layer_of(path), 0.0), errors)
        return self.named("mhc", {
            layer: {"row_sum_error": row, "column_sum_error": column} for layer, (row, column) in layers.items()
        })
