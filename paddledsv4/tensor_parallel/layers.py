"""Layers whose weights are split over tensor ranks. They multiply; where ranks meet, the layer that uses them says.

Every rank draws the full weight and keeps its shard, so that initial weights do not depend on the layout.
"""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.distributed.group import Group
from paddledsv4.transformer.build import Build, constant, parameter
from paddledsv4.transformer.linear import Linear
from paddledsv4.weights.shards import COLUMNS, GATE_AND_LINEAR, ROWS, Split


def shard(full: Tensor, split: Split, group: Group) -> Tensor:
    """This rank's shard of a parameter, as a parameter; the parameter itself in a group of one."""
    if group.size == 1:
        return full
    part = split.shard(full.detach(), group.rank, group.size).contiguous()
    kept = constant(part.shape, part.dtype, 0.0)
    kept.set_value(part)
    return kept


class ShardedLinear(Linear):
    """y = x W^T with this rank's shard of the weight [out, in], of which ``split`` says which it is."""

    split: Split

    def __init__(self, build: Build, in_features: int, out_features: int, group: Group):
        super().__init__(build, in_features, out_features)
        self.weight = shard(self.weight, self.split, group)


class ColumnParallelLinear(ShardedLinear):
    """x [..., in] whole -> this rank's part of [..., out]: columns of W^T, which are rows of the weight."""

    split = ROWS


class GateAndLinear(ShardedLinear):
    """Column-parallel with two outputs side by side: of each of them a rank has its part."""

    split = GATE_AND_LINEAR


class RowParallelLinear(ShardedLinear):
    """This rank's part of x [..., in] -> its part of the sum that is the output [..., out]."""

    split = COLUMNS


class Embedding(nn.Layer):
    """Token embedding: word_embeddings.weight [V, C]."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops, self.tensor = build.ops, build.tensor
        config = build.config
        self.rows = self.tensor.share(config.vocab_size, "vocab_size")
        normal = nn.initializer.Normal(0.0, config.initializer_range)
        self.word_embeddings = nn.Layer()
        full = parameter([config.vocab_size, config.hidden_size], build.dtype, normal)
        self.word_embeddings.weight = shard(full, ROWS, self.tensor.group)

    def forward(self, input_ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """[b, s] -> [s, b, C]. ``weight``: one of several copies of the table, see fan_out."""
        return self.ops.embedding(input_ids, self.word_embeddings.weight if weight is None else weight)


class VocabParallelEmbedding(Embedding):
    """Each rank looks up the ids whose rows it holds, and has zero for the others."""

    def forward(self, input_ids: Tensor, weight: Tensor | None = None) -> Tensor:
        local, here = own_ids(input_ids, self.rows, self.tensor.group)
        found = super().forward(local, weight)
        return self.tensor.leave(found * here.t().unsqueeze(-1).astype(found.dtype))


def embedding(build: Build) -> Embedding:
    """The embedding for the tensor group of this build."""
    return (Embedding if build.groups.tensor.size == 1 else VocabParallelEmbedding)(build)


def own_ids(ids: Tensor, rows: int, group: Group) -> tuple[Tensor, Tensor]:
    """ids of any shape -> row in this rank's ``rows`` rows of the vocabulary (0 for others), and which are its own."""
    local = ids - group.rank * rows
    here = (local >= 0) & (local < rows)
    return local * here.astype(local.dtype), here
