"""Feed-forward experts with clamped SwiGLU."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build
from paddledsv4.transformer.linear import Linear


class MLP(nn.Layer):
    """fc2(swiglu(fc1(x)) * prob): a routed expert with ``prob``, the shared expert without."""

    def __init__(self, build: Build, intermediate: int):
        super().__init__()
        self.ops = build.ops
        self.limit = build.config.swiglu_limit
        self.linear_fc1 = Linear(build.at("linear_fc1"), build.config.hidden_size, 2 * intermediate)
        self.linear_fc2 = Linear(build.at("linear_fc2"), intermediate, build.config.hidden_size)

    def forward(self, x: Tensor, prob: Tensor | None = None) -> Tensor:
        """x [..., C], prob [...] or None -> [..., C]."""
        return self.linear_fc2(self.ops.swiglu(self.linear_fc1(x), prob, limit=self.limit))


class Experts(nn.Layer):
    """The routed experts, one after another on their own rows."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.local_experts = nn.LayerList(
            MLP(build.at(f"local_experts.{e}"), config.moe_intermediate_size) for e in range(config.n_routed_experts)
        )

    def forward(self, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """rows [n, C] grouped by expert, probs [n], tokens_per_expert [E] -> [n, C].

        An expert without tokens runs on no rows, so that its parameters stay in the graph.
        """
        counts = tokens_per_expert.tolist()
        rows, probs = self.ops.split_rows(rows, counts), self.ops.split_rows(probs, counts)
        outputs = [expert(x, p) for expert, x, p in zip(self.local_experts, rows, probs, strict=True)]
        return self.ops.concat_rows(*outputs)
