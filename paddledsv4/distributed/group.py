"""The interface of a group of ranks, and the group of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor


class Group:
    """Ranks that exchange tensors. This base class is a rank alone, for which every collective is the identity.

    Tensors are contiguous and are not differentiated here (``paddledsv4.distributed.collectives`` does that). Every
    rank of a group has to call the same collectives in the same order.

    Attributes:
        name: the kind of group, for messages.
        ranks: global ranks of the members, ascending; results are ordered like it.
        rank: index of this process in ``ranks``.
    """

    def __init__(self, name: str = "world", ranks: Sequence[int] = (0,), rank: int = 0):
        self.name, self.ranks, self.rank = name, tuple(ranks), rank

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Sum (or ``op="max"``) over the members, in place.

        The order in which a backend adds is a function of the position in ``x`` and of its size: the same numbers
        laid out otherwise may give other bits.
        """
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...], of one shape on every member -> [size * n, ...], the first member's rows first."""
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """x [size * n, ...] -> [n, ...]: the sum over the members of the rows that belong to this one."""
        return x

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """x [sum(send), ...] -> [sum(receive), ...]: ``send[i]`` rows to member i, ``receive[i]`` rows from it."""
        return x

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """The tensor of member ``source``, in place."""
        return x

    def barrier(self) -> None:
        """Return when all members have come here."""


@dataclass(frozen=True)
class Groups:
    """The groups that this rank belongs to; see :func:`paddledsv4.distributed.topology.rank_groups`."""

    world: Group = Group("world")
    replicas: Group = Group("replicas")
    tensor: Group = Group("tensor")
    context: Group = Group("context")
    data: Group = Group("data")
    expert: Group = Group("expert")
    expert_data: Group = Group("expert_data")
    expert_tensor: Group = Group("expert_tensor")
    expert_shards: Group = Group("expert_shards")


ALONE = Groups()


def counts(x: Tensor) -> list[int]:
    """An integer tensor as a list."""
    return [int(n) for n in x.tolist()]


def empty_rows(rows: int, like: Tensor) -> Tensor:
    """[rows, ...] of the shape and dtype of ``like`` beyond its first dimension."""
    return paddle.empty([rows, *like.shape[1:]], like.dtype)
