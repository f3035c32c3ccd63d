"""Context parallelism: every rank of a context group holds a contiguous slice of every sequence.

Layers work on the tokens of their slice. Where a token looks at others, they are sent: those of the sliding window, of
a group that a border cuts, and all compressed entries. Where the position matters, the slice says where it starts. On
one rank the slice is the sequence and all of it is the identity.

The loss of a rank is that of its slice. Gradients are averaged over the ranks, so that a mean over the slice becomes
one over the sequence; :meth:`SequenceSlice.weight` makes up for slices with unequal numbers of tokens.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.config import ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.distributed.collectives import redistribute
from paddledsv4.distributed.group import Group


class SequenceSlice:
    """The tokens of this rank: positions ``start`` to ``start + length`` of a sequence of ``whole`` tokens.

    Args:
        group: the ranks that share the sequence, in the order of their slices.
        length: tokens of one slice.
    """

    def __init__(self, group: Group, length: int):
        self.group, self.ranks = group, group.size
        self.spans = [(rank * length, (rank + 1) * length) for rank in range(group.size)]
        self.start, self.length, self.whole = group.rank * length, length, group.size * length

    def local(self, *tables: Tensor) -> tuple[Tensor, ...]:
        """Tables [whole, ...] that every rank has -> the rows of this slice."""
        return tuple(table[self.start : self.start + self.length] for table in tables) if self.ranks > 1 else tables

    def with_previous(self, x: Tensor, before: int) -> Tensor:
        """x [length, ...] -> [at most before + length, ...]: the rows of this slice behind those that lie ``before``
        it in the sequence, as far as there are any."""
        if self.ranks == 1:
            return x
        want = [(max(first - before, 0), last) for first, last in self.spans]
        return redistribute(x, group=self.group, start=self.start, have=self.spans, want=want)

    def entries(self, ratio: int, overlap: bool) -> Entries:
        """The compressed entries of this sequence; ``overlap``: each one needs the tokens of the group before too."""
        return Entries(self, ratio, overlap)

    def elsewhere(self, x: Tensor) -> Tensor:
        """x -> its sum over the other slices. Not differentiated."""
        return self.group.all_reduce_(x.clone()) - x

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
        total = self.elsewhere(count) + count
        return count.item() * self.ranks / max(total.item(), 1.0)


class Entries:
    """The compressed entries of a sequence, one for every ``ratio`` tokens; a slice makes those that end in it.

    A group of tokens may begin before the slice, by several slices even. Slices in which no group ends make one that
    another slice makes too, and drop it.
    """

    def __init__(self, sequence: SequenceSlice, ratio: int, overlap: bool):
        self.sequence, self.ratio, self.whole = sequence, ratio, sequence.whole // ratio
        self.spans = [(first // ratio, last // ratio) for first, last in sequence.spans]
        self.made = [self._made(*span, overlap) for span in self.spans]
        self.first, self.last = self.made[sequence.group.rank]

    def _made(self, first: int, last: int, overlap: bool) -> tuple[int, int]:
        """What a slice computes: with ``overlap`` the entry before as well, of which the next one needs the tokens."""
        first = first - 1 if overlap and first else min(first, self.whole - 1)
        return first, max(last, first + 1)

    def tokens(self, x: Tensor) -> Tensor:
        """x [length, ...] of this slice -> the tokens [(last - first) * ratio, ...] of the entries it makes."""
        if self.sequence.ranks == 1:
            return x
        want = [(first * self.ratio, last * self.ratio) for first, last in self.made]
        sequence = self.sequence
        return redistribute(x, group=sequence.group, start=sequence.start, have=sequence.spans, want=want)

    def local(self, *tables: Tensor) -> tuple[Tensor, ...]:
        """Tables [whole, ...] that every rank has -> the rows of the entries that this slice makes."""
        return tuple(table[self.first : self.last] for table in tables) if self.sequence.ranks > 1 else tables

    def gather(self, made: Tensor) -> Tensor:
        """The entries that this slice made -> all of the sequence [whole, ...]."""
        if self.sequence.ranks == 1:
            return made
        everything = [(0, self.whole)] * self.sequence.ranks
        return redistribute(made, group=self.sequence.group, start=self.first, have=self.spans, want=everything)


def check_sequences(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig) -> None:
    """Whether the model has so many positions, and sequences can be cut into equal slices.

    Raises:
        UserError: it has not, or they cannot.
    """
    if train.sequence_length > model.max_positions:
        train.reject("sequence_length", f"must be at most the {model.max_positions} positions of the model")
    if train.sequence_length % parallel.context:
        train.reject("sequence_length", f"must be divisible by parallel.context ({parallel.context})")
