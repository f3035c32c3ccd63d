"""Feed-forward experts with clamped SwiGLU."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.distributed.group import Group
from paddledsv4.moe.mxfp4 import expert_linears
from paddledsv4.tensor_parallel.layers import GateAndLinear, RowParallelLinear
from paddledsv4.tensor_parallel.region import share
from paddledsv4.transformer.build import Build


class MLP(nn.Layer):
    """fc2(swiglu(fc1(x)) * prob): a routed expert with ``prob``, the shared expert without.

    The ranks of ``group`` split the intermediate features, and the output is each one's part of a sum.
    """

    def __init__(self, build: Build, intermediate: int, group: Group, linears=(GateAndLinear, RowParallelLinear)):
        super().__init__()
        self.ops = build.ops
        self.limit = build.config.swiglu_limit
        hidden = build.config.hidden_size
        fc1, fc2 = linears
        self.linear_fc1 = fc1(build.at("linear_fc1"), hidden, 2 * intermediate, group)
        self.linear_fc2 = fc2(build.at("linear_fc2"), intermediate, hidden, group)

    def forward(self, x: Tensor, prob: Tensor | None = None) -> Tensor:
        """x [..., C], prob [...] or None -> [..., C]."""
        return self.linear_fc2(self.ops.swiglu(self.linear_fc1(x), prob, limit=self.limit))


def local_experts(experts: int, group: Group) -> range:
    """The experts of this rank: the ranks of an expert group hold consecutive, equal shares.

    Raises:
        UserError: the experts cannot be shared out equally.
    """
    each = share(experts, "n_routed_experts", group.size, "expert")
    return range(group.rank * each, (group.rank + 1) * each)


class Experts(nn.Layer):
    """The routed experts of this rank, one after another on their own rows. Their names count over all ranks."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config, group = build.config, build.groups.expert_tensor
        share(config.moe_intermediate_size, "moe_intermediate_size", group.size, "expert_tensor")
        local = local_experts(config.n_routed_experts, build.groups.expert)
        # Experts of other ranks are drawn and dropped, so that the initial weights do not depend on the layout.
        drawn = ((e, MLP(build.at(f"local_experts.{e}"), config.moe_intermediate_size, group, expert_linears(build)))
                 for e in range(config.n_routed_experts))
        self.local_experts = nn.LayerDict({str(e): expert for e, expert in drawn if e in local})

    def forward(self, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """rows [n, C] grouped by expert, probs [n], tokens_per_expert [experts here] -> [n, C].

        An expert without tokens runs on no rows, so that its parameters stay in the graph.
        """
        counts = tokens_per_expert.tolist()
        rows, probs = self.ops.split_rows(rows, counts), self.ops.split_rows(probs, counts)
        outputs = [expert(x, p) for expert, x, p in zip(self.local_experts.values(), rows, probs, strict=True)]
        return self.ops.concat_rows(*outputs)
