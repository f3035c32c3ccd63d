"""The decoder: embedding to streams, layers, contraction to one hidden state, final norm."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build, ForwardContext
from paddledsv4.transformer.hyper_connection import Contraction
from paddledsv4.transformer.layer import TransformerLayer
from paddledsv4.transformer.norm import RMSNorm


class TransformerBlock(nn.Layer, Contraction):
    """Embedding [s, b, C] -> normed hidden [s, b, C] and the streams [s, b, n*C] that MTP continues from."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.streams = config.hc_mult
        self.create_contraction(build)
        self.layers = nn.LayerList(
            TransformerLayer(build.at(f"layers.{i}"), config.layer_ratio(i), config.is_hash_layer(i))
            for i in range(config.num_hidden_layers)
        )
        self.final_layernorm = RMSNorm(build.at("final_layernorm"), config.hidden_size)

    def forward(self, embedding: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        streams = self.ops.hc_expand(embedding, self.streams)
        for layer in self.layers:
            streams = layer(streams, context)
        hidden, streams = self.contract(streams)
        return self.final_layernorm(hidden), streams
