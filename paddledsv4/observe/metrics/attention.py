"""Gauges of attention: what the sink takes, how well the indexer chooses, and what its loss is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from paddle import Tensor, nn

from paddledsv4.observe.metrics.gauge import Gauge, reduced
from paddledsv4.observe.metrics.shares import attention_weights, recall, sampled_rows
from paddledsv4.observe.ops import OpCall
from paddledsv4.transformer.attention import CoreAttention

CHUNK_NUMBERS = 1 << 22  # at most about this many scores at a time


class AttentionShares(Gauge):
    """Means over a sample of the queries of a step, each call weighed by its number of queries.

    The recall is the indexer's: of the entries that dense attention weighs most, as many as it may choose, the share
    that it chose, and its choice's share of their weight.
    """

    layer, op = CoreAttention, "sparse_attention"

    def begin(self) -> None:
        self.sink = {path: np.zeros(2) for path in self.layers}
        self.recall = {path: np.zeros(3) for path, layer in self.layers.items() if layer.indexer is not None}

    def see(self, call: OpCall, outputs: tuple) -> None:
        query, _, compressed, *_ = call.args
        window, ratio, scale, offset = (call.kwargs[name] for name in ("window", "ratio", "scale", "offset"))
        rows = sampled_rows(query.shape[0])
        each = query.shape[0] / len(rows)  # queries that one of the sample stands for
        for some in _chunks(rows, query, window, compressed):
            share, mass, chosen = attention_weights(*call.args, window, ratio, scale, offset, some)
            self.sink[call.path] += each * np.array([float(share.sum()), share.size])
            if chosen is not None:
                mass = self.groups.tensor.all_reduce_(mass.contiguous())  # tensor ranks have a part of the heads each
                topk = self.layers[call.path].indexer.topk
                self.recall[call.path] += each * recall(mass, chosen, some, ratio, offset, topk)

    def values(self) -> dict[str, float]:
        sinks, recalls = (reduced(self.groups.world, x) for x in (self.sink, self.recall))
        return self.named("attention", {path: {"sink_share": s / n} for path, (s, n) in sinks.items()}) | self.named(
            "indexer",
            {path: {"recall_entries": e / n, "recall_weight": w / n} for path, (e, w, n) in recalls.items() if n},
        )


def _chunks(rows: np.ndarray, query: Tensor, window: int, compressed: Tensor | None) -> Iterator[np.ndarray]:
    _, b, heads, _ = query.shape
    scores = b * heads * (window + (0 if compressed is None else compressed.shape[0]))
    size = max(CHUNK_NUMBERS // scores, 1)
    return (rows[first : first + size] for first in range(0, len(rows), size))


class IndexerLoss(Gauge):
    """The mean over queries of the indexer's divergence from attention in nats, before its coefficient."""

    layer, op = CoreAttention, "indexer_loss"

    def watches(self, layer: nn.Layer) -> bool:
        return super().watches(layer) and layer.indexer is not None

    def begin(self) -> None:
        self.sums = {path: np.zeros(2) for path in self.layers}

    def see(self, call: OpCall, outputs: tuple) -> None:
        scores = call.args[0]
        queries = scores.shape[0] * scores.shape[1]
        self.sums[call.path] += queries * np.array([outputs[0].item() / call.kwargs["coeff"], 1.0])

    def values(self) -> dict[str, float]:
        totals = reduced(self.groups.world, self.sums)
        return self.named("indexer", {path: {"loss": kl / n} for path, (kl, n) in totals.items() if n})
