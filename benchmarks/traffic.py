"""Bytes that ranks send, counted where a layer asks for a collective."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from paddle import Tensor

from paddledsv4.distributed.group import Group, Groups


def payload(x: Tensor) -> int:
    """Bytes of a tensor."""
    return x.size * x.element_size()


class CountedGroup(Group):
    """A group that counts what this rank sends, per kind of group and collective, and passes everything on.

    Counted is what a bandwidth-optimal algorithm of the collective that was asked for sends: of p ranks, an
    all-reduce of n bytes sends 2 n (p - 1) / p from each, a reduce-scatter of n bytes n (p - 1) / p, an all-gather
    of n bytes a rank n (p - 1), an all-to-all the rows for other ranks, a broadcast n (p - 1) / p on average.
    """

    def __init__(self, inner: Group, sent: Counter):
        super().__init__(inner.name, inner.ranks, inner.rank)
        self.inner, self.sent = inner, sent

    def _count(self, operation: str, size: float) -> None:
        self.sent[self.name, operation] += size

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        self._count("all_reduce", 2 * payload(x) * (self.size - 1) / self.size)
        return self.inner.all_reduce_(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        self._count("all_gather", payload(x) * (self.size - 1))
        return self.inner.all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._count("reduce_scatter", payload(x) * (self.size - 1) / self.size)
        return self.inner.reduce_scatter(x)

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = sum(send)
        away = rows - send[self.rank]
        self._count("all_to_all", payload(x) * away / rows if rows else 0)
        return self.inner.all_to_all(x, send, receive)

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        self._count("broadcast", payload(x) * (self.size - 1) / self.size)
        return self.inner.broadcast_(x, source)

    def barrier(self) -> None:
        self.inner.barrier()


def counted(groups: Groups, sent: Counter) -> Groups:
    """The same groups; ``sent`` collects bytes by kind of group, where several kinds have the same ranks by the one
    that asks."""
    wrapped = {}
    for field in fields(Groups):
        group = getattr(groups, field.name)
        wrapped[field.name] = _named(CountedGroup(group, sent), field.name) if group.size > 1 else group
    return Groups(**wrapped)


def _named(group: CountedGroup, name: str) -> CountedGroup:
    group.name = name
    return group
