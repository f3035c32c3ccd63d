"""Packed experts whose products are one launch for all of them, where the fused kernel is chosen."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.packed_linear import grouped_packed_linear, packed_product
from paddledsv4.moe.experts import Experts
from paddledsv4.moe.mxfp4 import PackedLinear
from paddledsv4.transformer.build import Build


class GroupedExperts(Experts):
    """As :class:`Experts`. With adapters on them, whose products stand between, experts run one after another, each on
    the same kernel."""

    def __init__(self, build: Build):
        super().__init__(build)
        self.limit = build.config.swiglu_limit

    def forward(self, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """rows [n, C] grouped by expert, probs [n], tokens_per_expert [experts here] -> [n, C]."""
        experts = self.local_experts.values()
        first, second = [e.linear_fc1 for e in experts], [e.linear_fc2 for e in experts]
        if not all(isinstance(layer, PackedLinear) for layer in (*first, *second)):
            return super().forward(rows, probs, tokens_per_expert)
        hidden = self.ops.swiglu(_product(rows, tokens_per_expert, first), probs, limit=self.limit)
        return _product(hidden, tokens_per_expert, second)


def _product(x: Tensor, counts: Tensor, layers: list[PackedLinear]) -> Tensor:
    return grouped_packed_linear(x, counts, [e.weight for e in layers], [e.weight_scale for e in layers])


def experts(build: Build) -> Experts:
    """The experts of this build."""
    packed = build.expert_weight_format == "mxfp4"
    fused = packed and build.policy.follower(packed_product, build.path).name == "fused"
    return GroupedExperts(build) if fused else Experts(build)
