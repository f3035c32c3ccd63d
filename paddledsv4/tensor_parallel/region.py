"""Where the computation of tensor ranks parts and meets again. A layer is given one of these when it is built.

Between layers an activation [s, b, ...] is *at rest*: whole on every rank or, with sequence parallelism, one slice of
s per rank. Inside attention and experts the sequence is whole and the weights are split.
"""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.tensor_parallel import mappings


def share(size: int, what: str, ranks: int, kind: str = "tensor") -> int:
    """How much of ``size`` each rank holds. ``what`` names it and ``kind`` the ranks in the message.

    Raises:
        UserError: it cannot be shared out equally.
    """
    if size % ranks:
        raise UserError(f"parallel.{kind} = {ranks}: must divide {what} ({size})")
    return size // ranks


class OneRank:
    """A rank that holds everything: every passage is the identity."""

    def __init__(self, group: Group):
        self.group = group

    def share(self, size: int, what: str) -> int:
        """How much of ``size`` each tensor rank holds; see :func:`share`."""
        return share(size, what, self.group.size)

    def gather(self, x: Tensor) -> Tensor:
        """At rest -> whole, for a computation that every rank repeats."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """At rest -> whole, for a computation that is split over ranks."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Each rank's part of a sum -> the sum, at rest."""
        return x

    def copy(self, x: Tensor) -> Tensor:
        """From a computation that every rank repeats into one that is split."""
        return x

    def repeat(self, x: Tensor) -> Tensor:
        """From within :meth:`enter` into a computation that every rank repeats."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """Each rank's part of the last dimension -> all of it."""
        return x


class WholeAtRest(OneRank):
    """Activations at rest are whole."""

    def enter(self, x: Tensor) -> Tensor:
        return mappings.copy_to(x, group=self.group)

    def leave(self, x: Tensor) -> Tensor:
        return mappings.reduce_from(x, group=self.group)

    def copy(self, x: Tensor) -> Tensor:
        return mappings.copy_to(x, group=self.group)

    def repeat(self, x: Tensor) -> Tensor:
        return mappings.repeat(x, group=self.group)

    def join(self, x: Tensor) -> Tensor:
        return mappings.gather_from(x, group=self.group)


class SlicedAtRest(WholeAtRest):
    """Sequence parallelism: activations at rest are slices of the sequence."""

    def gather(self, x: Tensor) -> Tensor:
        return mappings.gather_sequence_repeated(x, group=self.group)

    def enter(self, x: Tensor) -> Tensor:
        return mappings.gather_sequence(x, group=self.group)

    def leave(self, x: Tensor) -> Tensor:
        return mappings.reduce_scatter_sequence(x, group=self.group)


def region(group: Group, sequence_parallel: bool) -> OneRank:
    """The region of a tensor group."""
    if group.size == 1:
        return OneRank(group)
    return (SlicedAtRest if sequence_parallel else WholeAtRest)(group)
