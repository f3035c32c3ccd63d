"""How evenly routers spread the tokens, and the expert biases that are to spread them."""

from __future__ import annotations

import numpy as np

from paddledsv4.moe.router import LearnedRouter, Router
from paddledsv4.observe.metrics.gauge import Gauge, reduced
from paddledsv4.observe.ops import OpCall


def spread(counts: np.ndarray) -> dict[str, float]:
    """counts [E]: tokens per expert -> the largest over the mean, the share of experts without a token, and the
    entropy of the shares divided by ln E, which is 1 for an even load and 0 if one expert takes all."""
    total = counts.sum()
    shares = counts[counts > 0] / total if total else np.ones(1)
    entropy = -(shares * np.log(shares)).sum() / np.log(max(len(counts), 2))
    return {
        "max_over_mean": counts.max() * len(counts) / total if total else 0.0,
        "empty_share": (counts == 0).mean(),
        "entropy": abs(entropy),  # not -0.0
    }


class RouterLoad(Gauge):
    """The spread of the tokens of a step, over all microbatches and ranks, learned and hash routers alike."""

    layer, op = Router, "router_probs"

    def begin(self) -> None:
        self.counts = {path: np.zeros(router.experts) for path, router in self.layers.items()}

    def see(self, call: OpCall, outputs: tuple) -> None:
        self.counts[call.path] += outputs[1].astype("int64").sum(0).numpy()

    def values(self) -> dict[str, float]:
        totals = reduced(self.groups.replicas, self.counts)  # tensor ranks know the same tokens
        return self.named("router", {path: spread(counts) for path, counts in totals.items()})


class ExpertBias(Gauge):
    """Extremes and mean of every learned router's bias, after the update that ends the step."""

    layer = LearnedRouter

    def values(self) -> dict[str, float]:
        biases = {path: router.expert_bias.numpy() for path, router in self.layers.items()}
        return self.named("expert_bias", {
            path: {"min": bias.min(), "max": bias.max(), "mean": bias.mean()} for path, bias in biases.items()
        })
