"""Hybrid attention: a sliding window in every layer, plus compressed entries at ratio 4 (CSA) or 128 (HCA)."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, shard
from paddledsv4.transformer.build import AuxiliaryLosses, Build, ForwardContext, constant, parameter
from paddledsv4.transformer.compressor import Compressor
from paddledsv4.transformer.documents import Part
from paddledsv4.transformer.indexer import Indexer
from paddledsv4.transformer.linear import Linear
from paddledsv4.transformer.norm import RMSNorm
from paddledsv4.transformer.rotary import RotaryEmbedding
from paddledsv4.weights.shards import ROWS


class CoreAttention(nn.Layer):
    """Window, compressed entries and sink: attn_sink [H], and at ratio 4 an indexer that selects entries."""

    def __init__(self, build: Build, ratio: int, rotary: RotaryEmbedding):
        super().__init__()
        self.ops, self.tensor = build.ops, build.tensor
        config = build.config
        self.ratio, self.window, self.scale = ratio, config.sliding_window, config.head_dim**-0.5
        heads = self.tensor.share(config.num_attention_heads, "num_attention_heads")
        self.attn_sink = constant([heads], build.wide_dtype, 0.0)
        self.compressor = (
            Compressor(build.at("compressor"), ratio, config.head_dim, rotary, build.quantize_kv) if ratio else None
        )
        self.indexer = Indexer(build.at("indexer"), ratio, rotary) if ratio == 4 else None

    def compresses(self, length: int) -> bool:
        """Whether a sequence of this length has compressed entries: at least one whole group."""
        return self.ratio > 0 and length >= self.ratio

    def forward(
        self, query: Tensor, kv: Tensor, x: tuple[Tensor, ...], q_lora: Tensor, part: Part, losses: AuxiliaryLosses
    ) -> Tensor:
        """query [s, b, H, D], kv [n, b, D] of the n >= s positions up to the last query, x two copies of [s, b, C] for
        the compressor (none if it has nothing to compress), q_lora [s, b, R] -> [s, b, H*D]."""
        sequence = part.sequence
        compressed = self.tensor.copy(self.compressor(*x, sequence)) if x else None
        scores = selected = None
        if self.indexer is not None and x:
            scores, selected = self.indexer(x[0], q_lora, sequence)
        out = self.ops.sparse_attention(
            query, kv, compressed, selected, self.attn_sink,
            window=self.window, ratio=self.ratio, scale=self.scale, offset=sequence.start,
        )
        if scores is not None and losses.indexer_coeff:
            loss = self.ops.indexer_loss(
                scores, query.detach(), kv.detach(), compressed.detach(), self.attn_sink.detach(), selected,
                window=self.window, ratio=self.ratio, scale=self.scale,
                coeff=losses.indexer_coeff * part.share, sparse=losses.indexer_sparse, offset=sequence.start,
                heads_of=self.tensor.group,
            )
            out = self.ops.attach_loss(out, loss, losses.indexer_seed)
        return out


class Attention(nn.Layer):
    """Low-rank queries, one shared key-value head, rotary positions, grouped low-rank output.

    Tensor ranks split heads and output groups; what all heads share, every rank computes.
    """

    def __init__(self, build: Build, ratio: int):
        super().__init__()
        self.ops, self.tensor = build.ops, build.tensor
        config = build.config
        self.heads = self.tensor.share(config.num_attention_heads, "num_attention_heads")
        self.head_dim, self.groups = config.head_dim, self.tensor.share(config.o_groups, "o_groups")
        self.eps = config.rms_norm_eps
        self.rotary = RotaryEmbedding.for_ratio(config, ratio)
        self.rotary_dtype, self.quantize_kv = build.wide_dtype, build.quantize_kv
        width, low_rank = config.num_attention_heads * self.head_dim, config.o_groups * config.o_lora_rank
        hidden, group = config.hidden_size, self.tensor.group
        normal = nn.initializer.Normal(0.0, config.initializer_range)
        full = parameter([low_rank, width // config.o_groups], build.dtype, normal)
        self.linear_o_group_proj = shard(full, ROWS, group)
        self.core_attention = CoreAttention(build.at("core_attention"), ratio, self.rotary)
        self.linear_proj = RowParallelLinear(build.at("linear_proj"), low_rank, hidden, group)
        self.linear_q_down_proj = Linear(build.at("linear_q_down_proj"), hidden, config.q_lora_rank)
        self.linear_q_up_proj = ColumnParallelLinear(build.at("linear_q_up_proj"), config.q_lora_rank, width, group)
        self.linear_kv_proj = Linear(build.at("linear_kv_proj"), hidden, self.head_dim)
        self.kv_layernorm = RMSNorm(build.at("kv_layernorm"), self.head_dim)
        self.q_layernorm = RMSNorm(build.at("q_layernorm"), config.q_lora_rank)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [s, b, C] -> [s, b, C]."""
        x = self.tensor.gather(x)
        s, b, _ = x.shape
        documents = context.documents
        compresses = self.core_attention.compresses(documents.longest(context.sequence))
        to_q, to_kv, *to_compressor = self.ops.fan_out(x, 4 if compresses else 2)
        q_lora = self.q_layernorm(self.linear_q_down_proj(to_q))
        query = self.linear_q_up_proj(self.tensor.copy(q_lora)).reshape([s, b, self.heads, self.head_dim])
        query = self.ops.head_norm(query, self.eps)
        kv = self.kv_layernorm(self.linear_kv_proj(to_kv))
        parts = documents.parts(context.sequence)
        inputs = zip(*(documents.apart(x) for x in (query, kv, q_lora, *to_compressor)), strict=True)
        out = documents.together(
            [self.attend(part, context.losses, *mine) for part, mine in zip(parts, inputs, strict=True)]
        ).reshape([s, b, -1])
        out = self.linear_proj(self.ops.grouped_linear(out, self.linear_o_group_proj, groups=self.groups))
        return self.tensor.leave(out)

    def attend(
        self, part: Part, losses: AuxiliaryLosses, query: Tensor, kv: Tensor, q_lora: Tensor, *x: Tensor
    ) -> Tensor:
        """query [s, b, H, D], kv [s, b, D], q_lora [s, b, R], x copies of [s, b, C] for the compressor, of documents
        of one length -> [s, b, H, D]."""
        sequence = part.sequence
        cos, sin = sequence.local(*self.rotary.table(self.ops, sequence.whole, self.rotary_dtype))
        query, kv = self.ops.rope(query, cos, sin), self.quantize_kv(self.ops.rope(kv, cos, sin))
        kv = self.tensor.copy(sequence.with_previous(kv, self.core_attention.window - 1))
        x = x if self.core_attention.compresses(sequence.whole) else ()
        out = self.core_attention(query, kv, x, q_lora, part, losses)
        return self.ops.rope(out.reshape(query.shape), cos, sin, inverse=True)
