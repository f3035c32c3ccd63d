"""Which parameters are split over tensor ranks, and how: from a full tensor to a rank's shard and back.

Names are Megatron's. What the table does not name is held by every tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from paddle import Tensor

from paddledsv4.distributed.group import Group, Groups
from paddledsv4.weights.names import expert_index


@dataclass(frozen=True)
class Split:
    """Ranks share out ``dim``, each block of it on its own; gate and linear half of a SwiGLU are two blocks."""

    dim: int
    blocks: int = 1

    def _in_blocks(self, tensor):
        shape = list(tensor.shape)
        return tensor.reshape([*shape[: self.dim], self.blocks, -1, *shape[self.dim + 1 :]])

    def _joined(self, tensor):
        shape = list(tensor.shape)
        return tensor.reshape([*shape[: self.dim], -1, *shape[self.dim + 2 :]])

    def shard(self, full, rank: int, ranks: int):
        """The part of one rank. ``full`` is an array or a tensor whose ``dim`` the ranks can share out equally."""
        blocks = self._in_blocks(full)
        size = blocks.shape[self.dim + 1] // ranks
        index = (*[slice(None)] * (self.dim + 1), slice(rank * size, (rank + 1) * size))
        return self._joined(blocks[index])

    def join(self, shards: Iterable[np.ndarray]) -> np.ndarray:
        """The full array from those of all ranks, in their order."""
        return self._joined(np.concatenate([self._in_blocks(shard) for shard in shards], self.dim + 1))


ROWS, COLUMNS, GATE_AND_LINEAR = Split(0), Split(1), Split(0, blocks=2)

SPLITS: Mapping[str, Split] = {
    "embedding.word_embeddings.weight": ROWS,
    "output_layer.weight": ROWS,
    "*.self_attention.linear_q_up_proj.weight": ROWS,
    "*.self_attention.core_attention.attn_sink": ROWS,
    "*.self_attention.linear_o_group_proj": ROWS,
    "*.self_attention.linear_proj.weight": COLUMNS,
    "*.linear_fc1.weight": GATE_AND_LINEAR,
    "*.linear_fc2.weight": COLUMNS,
}
WHOLE_SEQUENCE = (".self_attention.", ".mlp.")  # inside these layers every tensor rank sees all of it


def split_of(name: str) -> Split | None:
    """How ranks share a parameter; None: every tensor rank holds it."""
    return next((split for pattern, split in SPLITS.items() if fnmatchcase(name, pattern)), None)


def on_slices(name: str) -> bool:
    """Whether, with sequence parallelism, each rank's gradient comes from its slice of the sequence alone."""
    return split_of(name) is None and not any(layer in name for layer in WHOLE_SEQUENCE)


def shares_of(name: str, groups: Groups) -> Group:
    """The ranks that share out a parameter which is split."""
    return groups.tensor if expert_index(name) is None else groups.expert_tensor


def shards_of_rank(state: Mapping[str, np.ndarray], groups: Groups) -> dict[str, np.ndarray]:
    """This rank's part of a full state: shards of what is split, all of what is not. Shapes are not checked here;
    a tensor that cannot be shared out stays as it is, for the strict load to refuse."""
    result = {}
    for name, value in state.items():
        split, group = split_of(name), shares_of(name, groups)
        if split and value.ndim > split.dim and value.shape[split.dim] % (split.blocks * group.size) == 0:
            value = split.shard(value, group.rank, group.size)
        result[name] = value
    return result


def gather_full(tensors: Mapping[str, Tensor], groups: Groups) -> dict[str, np.ndarray]:
    """Full arrays from this rank's tensors, on every rank; all ranks call it with the same names in one order.

    Experts of other ranks of the expert group stay there.
    """
    result = {}
    for name, tensor in tensors.items():
        split, group = split_of(name), shares_of(name, groups)
        if split is None or group.size == 1:
            result[name] = tensor.numpy()
            continue
        everyone = group.all_gather(tensor.detach().contiguous().unsqueeze(0))
        result[name] = split.join(part.numpy() for part in everyone)
    return result
