"""Compressor: learned pooling of groups of tokens into key-value entries (ratio 4 overlapping, ratio 128 not)."""

from __future__ import annotations

from collections.abc import Callable

from paddle import Tensor, nn

from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.ops.fake_quantize import unchanged
from paddledsv4.transformer.build import Build, constant
from paddledsv4.transformer.linear import Linear
from paddledsv4.transformer.norm import RMSNorm
from paddledsv4.transformer.rotary import RotaryEmbedding


class Compressor(nn.Layer):
    """a [s, b, C] -> entries [S // ratio, b, head_dim], normalised and rotated to their group's first position.

    s tokens of this rank, S of the sequence, whose entries every rank gets. ``quantize``: the last thing done to them.
    """

    def __init__(
        self, build: Build, ratio: int, head_dim: int, rotary: RotaryEmbedding,
        quantize: Callable[[Tensor], Tensor] = unchanged,
    ):
        super().__init__()
        self.ops, self.quantize = build.ops, quantize
        self.ratio, self.overlap, self.rotary = ratio, ratio == 4, rotary
        self.rotary_dtype = build.wide_dtype
        width = head_dim * (2 if self.overlap else 1)
        self.ape = constant([ratio, width], build.wide_dtype, 0.0)
        self.linear_wkv = Linear(build.at("linear_wkv"), build.config.hidden_size, width)
        self.linear_wgate = Linear(build.at("linear_wgate"), build.config.hidden_size, width)
        self.norm = RMSNorm(build.at("norm"), head_dim)

    def forward(self, x_kv: Tensor, x_gate: Tensor, sequence: SequenceSlice) -> Tensor:
        """x_kv and x_gate are the same activation, handed out to its two consumers."""
        entries = sequence.entries(self.ratio, self.overlap)
        kv, gate = entries.tokens(self.linear_wkv(x_kv)), entries.tokens(self.linear_wgate(x_gate))
        pooled = self.ops.compress(kv, gate, self.ape, ratio=self.ratio, overlap=self.overlap)
        made = self.norm(pooled.astype(x_kv.dtype))
        cos, sin = entries.local(*self.rotary.table(self.ops, entries.whole, self.rotary_dtype, stride=self.ratio))
        return entries.gather(self.quantize(self.ops.rope(made, cos, sin)))
