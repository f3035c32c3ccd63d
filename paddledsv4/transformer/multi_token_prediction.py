"""Multi-token prediction: one more layer that sees the next token's embedding and predicts the one after it."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build, ForwardContext
from paddledsv4.transformer.hyper_connection import Contraction
from paddledsv4.transformer.layer import TransformerLayer
from paddledsv4.transformer.linear import Linear
from paddledsv4.transformer.norm import RMSNorm


class MultiTokenPredictionLayer(nn.Layer, Contraction):
    """Streams and the embedding of the next token -> hidden state that predicts the token after it."""

    def __init__(self, build: Build, depth: int):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.streams, hidden = config.hc_mult, config.hidden_size
        self.create_contraction(build)
        self.enorm = RMSNorm(build.at("enorm"), hidden)
        self.hnorm = RMSNorm(build.at("hnorm"), hidden)
        self.e_proj = Linear(build.at("e_proj"), hidden, hidden)
        self.h_proj = Linear(build.at("h_proj"), hidden, hidden)
        ratio = config.layer_ratio(config.num_hidden_layers + depth)
        self.mtp_model_layer = TransformerLayer(build.at("mtp_model_layer"), ratio, hash_routing=False)
        self.final_layernorm = RMSNorm(build.at("final_layernorm"), hidden)

    def forward(self, streams: Tensor, embedding: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """streams [s, b, n*C], embedding of the rolled ids [s, b, C] -> normed hidden [s, b, C], streams [s, b, n*C].

        Every stream is projected alone, and the projected embedding is added to each.
        """
        s, b, width = streams.shape
        e = self.e_proj(self.enorm(embedding)).unsqueeze(2)
        h = self.h_proj(self.hnorm(streams.reshape([s, b, self.streams, width // self.streams])))
        streams = self.mtp_model_layer(self.ops.add(e, h).reshape([s, b, width]), context)
        hidden, streams = self.contract(streams)
        return self.final_layernorm(hidden), streams


class MultiTokenPredictionBlock(nn.Layer):
    """The MTP layers, in order of depth."""

    def __init__(self, build: Build):
        super().__init__()
        depths = range(build.config.num_nextn_predict_layers)
        self.layers = nn.LayerList(MultiTokenPredictionLayer(build.at(f"layers.{d}"), d) for d in depths)
