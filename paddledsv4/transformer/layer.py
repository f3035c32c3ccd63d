"""One transformer layer: attention, then mixture of experts, each inside a hyper-connection."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.moe.layer import MoELayer
from paddledsv4.transformer.attention import Attention
from paddledsv4.transformer.build import Build, ForwardContext
from paddledsv4.transformer.hyper_connection import HyperConnection
from paddledsv4.transformer.norm import RMSNorm


class TransformerLayer(nn.Layer):
    """streams [s, b, n*C] -> streams [s, b, n*C]."""

    def __init__(self, build: Build, ratio: int, hash_routing: bool):
        super().__init__()
        hidden = build.config.hidden_size
        self.input_layernorm = RMSNorm(build.at("input_layernorm"), hidden)
        self.self_attention = Attention(build.at("self_attention"), ratio)
        self.pre_mlp_layernorm = RMSNorm(build.at("pre_mlp_layernorm"), hidden)
        self.mlp = MoELayer(build.at("mlp"), hash_routing)
        self.self_attention_hyper_connection = HyperConnection(build.at("self_attention_hyper_connection"))
        self.mlp_hyper_connection = HyperConnection(build.at("mlp_hyper_connection"))

    def forward(self, streams: Tensor, context: ForwardContext) -> Tensor:
        """X <- mix(X, attention(norm(aggregate(X)))), then the same with the experts."""
        x, streams, h_res, h_post = self.self_attention_hyper_connection(streams)
        out = self.self_attention(self.input_layernorm(x), context)
        streams = self.self_attention_hyper_connection.mix(streams, h_res, h_post, out)
        x, streams, h_res, h_post = self.mlp_hyper_connection(streams)
        out = self.mlp(self.pre_mlp_layernorm(x), context)
        return self.mlp_hyper_connection.mix(streams, h_res, h_post, out)
