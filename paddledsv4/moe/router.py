"""Routers: learned (top-k of affinities, selection shifted by an expert bias) and hash (a table by token id)."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn

from paddledsv4.moe.balance import sequence_loss
from paddledsv4.transformer.build import Build, ForwardContext, parameter


class Router(nn.Layer):
    """x [s, b, C] -> probs [s*b, E] and routing map [s*b, E]."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.experts, self.topk = config.n_routed_experts, config.num_experts_per_tok
        self.scaling, self.normalise = config.routed_scaling_factor, config.norm_topk_prob
        normal = nn.initializer.Normal(0.0, config.initializer_range)
        self.weight = parameter([self.experts, config.hidden_size], build.dtype, normal)
        self.sequence_loss = sequence_loss(build.groups.context)

    def choose(self, scores: Tensor, context: ForwardContext) -> Tensor:
        """scores [T, E] -> expert ids [T, K]."""
        raise TypeError("use LearnedRouter or HashRouter")

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        logits = self.ops.router_logits(x, self.weight).reshape([-1, self.experts])
        scores = self.ops.router_scores(logits)
        index = self.choose(scores, context)
        probs, routing_map = self.ops.router_probs(scores, index, self.scaling, self.normalise)
        losses = context.losses
        if losses.sequence_coeff:
            by_row = logits.reshape([*x.shape[:2], -1])
            loss = self.sequence_loss(self.ops, by_row, self.topk, losses.sequence_coeff, context)
            probs = self.ops.attach_loss(probs, loss, losses.seed * context.sequence.ranks)
        return probs, routing_map


class LearnedRouter(Router):
    """Top-k of the affinities plus ``expert_bias``, which balances the load without a gradient (spec 9.6)."""

    def __init__(self, build: Build):
        super().__init__(build)
        self.dtype = build.dtype
        # As in the reference (spec 9.2): a single choice is weighed by its affinity, else no gradient reached it.
        self.normalise = self.normalise and self.topk > 1
        self.register_buffer("expert_bias", paddle.zeros([self.experts], build.wide_dtype))
        counts = paddle.zeros([self.experts], build.wide_dtype)
        self.register_buffer("local_tokens_per_expert", counts, persistable=False)

    def choose(self, scores: Tensor, context: ForwardContext) -> Tensor:
        return self.ops.router_topk(scores, self.expert_bias, self.topk)

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().forward(x, context)
        if paddle.is_grad_enabled():
            counts = self.ops.count_tokens(self.local_tokens_per_expert, routing_map, dtype=self.dtype)
            paddle.assign(counts, self.local_tokens_per_expert)
        return probs, routing_map

    @paddle.no_grad()
    def update_expert_bias(self, rate: float) -> None:
        """Raise the bias of experts below the mean load by ``rate``, lower the others; then count anew."""
        self.ops.expert_bias_update(self.expert_bias, self.local_tokens_per_expert, rate, dtype=self.dtype)
        self.local_tokens_per_expert.zero_()


class HashRouter(Router):
    """Experts fixed by a table over token ids, tid2eid [V, K]; the affinities only weigh them."""

    def __init__(self, build: Build):
        super().__init__(build)
        ids = paddle.arange(build.config.vocab_size, dtype="int32").unsqueeze(1)
        table = (ids + paddle.arange(self.topk, dtype="int32")) % self.experts
        self.register_buffer("tid2eid", table)

    def choose(self, scores: Tensor, context: ForwardContext) -> Tensor:
        return paddle.gather(self.tid2eid, context.input_ids.t().flatten()).astype("int64")
