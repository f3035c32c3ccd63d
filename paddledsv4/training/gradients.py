"""Main gradients, laid out for the ranks that share their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from paddledsv4.distributed.group import Group, Groups
from paddledsv4.moe.experts import Experts
from paddledsv4.ops.precision import accumulate_dtype, widen
from paddledsv4.weights.shards import split_of

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """Parameters, in the model's order, that the ranks of ``replicas`` share and those of ``shards`` divide.

    Some of them all ranks of ``shards`` may hold as well; ``counted`` are the names that this rank adds to the norm.
    """

    named: Named
    replicas: Group
    shards: Group
    counted: frozenset[str]


def parts(model: nn.Layer, groups: Groups) -> list[Part]:
    """The dense parameters; then the experts, if other ranks share them. Frozen ones are left out."""
    named = [(name, p) for name, p in model.named_parameters() if not p.stop_gradient]
    counted = frozenset(name for name, _ in named if groups.tensor.rank == 0 or split_of(name))
    if groups.expert_data.ranks == groups.replicas.ranks:
        return [Part(named, groups.replicas, groups.tensor, counted)]
    layers = [layer for layer in model.sublayers() if isinstance(layer, Experts)]
    experts = {id(p) for layer in layers for p in layer.parameters()}
    dense = [(name, p) for name, p in named if id(p) not in experts]
    return [
        Part(dense, groups.replicas, groups.tensor, counted),
        Part([(name, p) for name, p in named if id(p) in experts], groups.expert_data, groups.expert_shards, counted),
    ]


def sum_slices(gradients: Sequence[Tensor], group: Group) -> None:
    """Sum, in place, the gradients to which each tensor rank contributes a slice of the sequence."""
    if group.size == 1 or not gradients:
        return
    total = group.all_reduce_(paddle.concat([g.flatten() for g in gradients]))
    for g, part in zip(gradients, paddle.split(total, [g.size for g in gradients]), strict=True):
        g.zero_().add_(part.reshape(g.shape))  # in place: a gradient is a view of a buffer


def total_norm(groups: Sequence[Group], norms: Sequence[float], dtype) -> float:
    """The norm over all ranks from every part's own; ``groups``: the ranks that divide each part (spec 13).

    The squares are added in ``dtype``, that of the gradients, as the reference does.
    """
    totals = []
    for group, norm in zip(groups, norms, strict=True):
        if group.size > 1:
            square = group.all_reduce_(paddle.to_tensor([norm**2], dtype))
            norm = square.item() ** 0.5
        totals.append(norm)
    return totals[0] if len(totals) == 1 else math.sqrt(sum(norm**2 for norm in totals))


class MainGradients:
    """One accumulator per parameter, float32 or wider: ``self[name]``.

    Where ranks share parameters, the accumulators of one part and dtype are views of one buffer in reverse order of
    the parameters, as in Megatron. The layout decides bits: an all-reduce adds in an order that depends on the
    position in the buffer.
    """

    def __init__(self, parts: list[Part], ranks: int):
        self.scale = 1.0 / ranks
        self.views: dict[str, Tensor] = {}
        self.buffers: list[tuple[Tensor, Group]] = []
        for part in parts:
            if ranks == part.replicas.size == 1:
                self.views |= {name: paddle.zeros(p.shape, widen(p).dtype) for name, p in part.named}
                continue
            for dtype in dict.fromkeys(p.dtype for _, p in part.named):
                self._lay_out([(name, p) for name, p in part.named if p.dtype == dtype], part.replicas)

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def _lay_out(self, named: Named, group: Group) -> None:
        buffer = paddle.zeros([sum(p.size for _, p in named)], accumulate_dtype(named[0][1].dtype))
        start = 0
        for name, p in reversed(named):
            self.views[name] = buffer[start : start + p.size].reshape(p.shape)
            start += p.size
        self.buffers.append((buffer, group))

    @paddle.no_grad()
    def average(self) -> None:
        """Divide by the number of ranks with data of their own, then sum over the ranks that share the parameters."""
        for buffer, group in self.buffers:
            buffer.scale_(self.scale)
            group.all_reduce_(buffer)
