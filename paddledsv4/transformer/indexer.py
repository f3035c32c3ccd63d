"""Lightning indexer: small heads that choose which compressed entries a query attends to."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.transformer.build import Build
from paddledsv4.transformer.compressor import Compressor
from paddledsv4.transformer.linear import Linear
from paddledsv4.transformer.rotary import RotaryEmbedding


class Indexer(nn.Layer):
    """Scores of every query against every entry. Its inputs are detached: only its own loss trains it."""

    def __init__(self, build: Build, ratio: int, rotary: RotaryEmbedding):
        super().__init__()
        self.ops, self.quantize = build.ops, build.quantize_index
        config = build.config
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio, self.rotary, self.rotary_dtype = ratio, rotary, build.wide_dtype
        self.linear_wq_b = Linear(build.at("linear_wq_b"), config.q_lora_rank, self.heads * self.head_dim)
        self.linear_weights_proj = Linear(build.at("linear_weights_proj"), config.hidden_size, self.heads)
        self.compressor = Compressor(build.at("compressor"), ratio, self.head_dim, rotary)

    def forward(self, x: Tensor, q_lora: Tensor, sequence: SequenceSlice) -> tuple[Tensor, Tensor]:
        """x [s, b, C], q_lora [s, b, R] -> scores [b, s, g], chosen entries [b, s, min(topk, g)] int32, -1: none.

        The g entries are those of the whole sequence.
        """
        x, q_lora = x.detach(), q_lora.detach()
        s, b, _ = x.shape
        cos, sin = sequence.local(*self.rotary.table(self.ops, sequence.whole, self.rotary_dtype))
        query = self.linear_wq_b(q_lora).reshape([s, b, self.heads, self.head_dim])
        query = self.quantize(self.ops.hadamard(self.ops.rope(query, cos, sin)))
        key = self.quantize(self.ops.hadamard(self.compressor(x, x, sequence)))
        weights = self.ops.indexer_weights(self.linear_weights_proj(x), self.heads)
        scores = self.ops.indexer_score(query, key, weights)
        return scores, self.ops.indexer_topk(scores.detach(), self.topk, self.ratio, offset=sequence.start)
