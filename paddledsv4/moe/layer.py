"""Mixture-of-experts layer: shared expert plus the routed experts of every token."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.moe.dispatcher import dispatcher, own_assignments
from paddledsv4.moe.experts import MLP
from paddledsv4.moe.grouped_experts import experts
from paddledsv4.moe.router import HashRouter, LearnedRouter
from paddledsv4.transformer.build import Build, ForwardContext


class MoELayer(nn.Layer):
    """x [s, b, C] -> [s, b, C]."""

    def __init__(self, build: Build, hash_routing: bool):
        super().__init__()
        self.ops, self.tensor = build.ops, build.tensor
        config = build.config
        self.router = (HashRouter if hash_routing else LearnedRouter)(build.at("router"))
        self.experts = experts(build.at("experts"))
        self.own_assignments, self.dispatcher = own_assignments(build), dispatcher(build)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.tensor.share(shared, "n_shared_experts x moe_intermediate_size")
        self.shared_experts = MLP(build.at("shared_experts"), shared, build.groups.tensor) if shared else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = self.tensor.enter(x)
        *to_shared, to_router, to_experts = self.ops.fan_out(x, 3 if self.shared_experts is not None else 2)
        shared = self.shared_experts(*to_shared) if to_shared else None
        probs, routing_map = self.router(self.tensor.repeat(to_router), context)
        routing_map = self.own_assignments(routing_map)
        tokens = to_experts.reshape([-1, x.shape[-1]])
        rows, row_probs, token_index = self.ops.permute(tokens, self.tensor.copy(probs), routing_map)
        out = self.dispatcher(self.experts, rows, row_probs, routing_map.astype("int64").sum(0))
        routed = self.ops.unpermute(out, token_index, tokens.shape[0])
        routed = routed.reshape(x.shape)
        return self.tensor.leave(routed if shared is None else self.ops.add(routed, shared))
