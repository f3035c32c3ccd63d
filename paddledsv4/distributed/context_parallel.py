"""Context parallelism: every rank of a context group holds a contiguous slice of every sequence.

Layers work on the tokens of their slice. Where a token looks at others, what it looks at is gathered; where the
position matters, the slice says where it starts. On one rank the slice is the sequence and all of it is the identity.

The loss of a rank is that of its slice. Gradients are averaged over the ranks, so that a mean over the slice becomes
one over the sequence; :meth:`SequenceSlice.weight` makes up for slices with unequal numbers of tokens.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.config import ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.distributed.collectives import all_gather, gather_constants
from paddledsv4.distributed.group import Group


class SequenceSlice:
    """The tokens of this rank: positions ``start`` to ``start + length`` of a sequence of ``whole`` tokens.

    Args:
        group: the ranks that share the sequence, in the order of their slices.
        length: tokens of one slice.
    """

    def __init__(self, group: Group, length: int):
        self.group, self.ranks = group, group.size
        self.start, self.length, self.whole = group.rank * length, length, group.size * length

    def local(self, *tables: Tensor) -> tuple[Tensor, ...]:
        """Tables [whole, ...] that every rank has -> the rows of this slice."""
        return tuple(table[self.start : self.start + self.length] for table in tables) if self.ranks > 1 else tables

    def gather(self, x: Tensor) -> Tensor:
        """x [length, ...] -> [whole, ...]; the gradients of all ranks are summed, each rank gets its rows."""
        return all_gather(x, group=self.group) if self.ranks > 1 else x

    def gather_constants(self, x: Tensor) -> Tensor:
        """x [length, ...] -> [whole, ...] where only the rows of this rank are differentiated.

        For a function of the whole sequence that every rank computes: its gradient needs no communication.
        """
        return gather_constants(x, group=self.group) if self.ranks > 1 else x

    def roll_left(self, x: Tensor) -> Tensor:
        """x [b, length] -> [b, length]: every position takes its right neighbour's value, the last of this slice the
        first of the next rank's slice, the last of the sequence 0. Not differentiated."""
        firsts = self.group.all_gather(x[:, :1].t().contiguous())
        firsts = paddle.concat([firsts, paddle.zeros_like(firsts[:1])], 0)
        return paddle.concat([x[:, 1:], firsts[self.group.rank + 1].unsqueeze(1)], 1)

    def weight(self, mask: Tensor) -> float:
        """What the mean over this slice's tokens weighs in the mean over the sequence's, times the number of ranks.

        mask [b, length] counts tokens. 1 where all slices have as many.
        """
        if self.ranks == 1:
            return 1.0
        count = mask.astype("float64").sum().reshape([1])
        total = self.group.all_reduce_(count.clone())
        return count.item() * self.ranks / max(total.item(), 1.0)


def check_sequences(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig) -> None:
    """Whether the model has so many positions, and sequences can be cut into equal slices.

    Raises:
        UserError: it has not, or they cannot.
    """
    if train.sequence_length > model.max_positions:
        train.reject("sequence_length", f"must be at most the {model.max_positions} positions of the model")
    if train.sequence_length % parallel.context:
        train.reject("sequence_length", f"must be divisible by parallel.context ({parallel.context})")
