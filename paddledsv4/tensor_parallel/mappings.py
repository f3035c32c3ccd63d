"""Between what tensor ranks hold whole and what they hold in parts, each with its gradient.

The loss is one loss that every rank of the group computes, so these are not the collectives of
:mod:`paddledsv4.distributed.collectives`, whose loss is a sum over ranks: there a sum is followed by the sum of the
gradients, here by the gradient itself. Four forms of an activation, or of its gradient, occur:

* whole: the same numbers on every rank;
* partial: the sum over ranks is meant;
* a slice of the first dimension (the sequence), by rank;
* a part of the last dimension (heads, features, vocabulary), by rank.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.numerics.function import differentiable


def _sum(x: Tensor, group: Group) -> Tensor:
    return group.all_reduce_(x.contiguous().clone())


def _alias(x: Tensor) -> Tensor:
    return x.view(list(x.shape))  # not x itself, which would be taken for an in-place operation


def _part(x: Tensor, group: Group, dim: int) -> Tensor:
    return paddle.chunk(x, group.size, dim)[group.rank].contiguous()


def _joined(x: Tensor, group: Group) -> Tensor:
    parts = group.all_gather(x.contiguous().unsqueeze(0))
    return paddle.concat(list(parts), -1)


@differentiable
def copy_to(x: Tensor, group: Group):
    """Whole -> the same, for parts of a computation; partial gradients are summed."""
    return _alias(x), lambda dy: (_sum(dy, group),)


@differentiable
def reduce_from(x: Tensor, group: Group):
    """Partial -> whole; the gradient is whole already."""
    return _sum(x, group), lambda dy: (dy,)


@differentiable
def repeat(x: Tensor, group: Group):
    """Whole -> the same, for a computation that every rank repeats; of its whole gradient each keeps one n-th."""
    return _alias(x), lambda dy: (dy / group.size,)


@differentiable
def gather_from(x: Tensor, group: Group):
    """Part [..., n] -> whole [..., size * n]; of the whole gradient each keeps its part."""
    return _joined(x, group), lambda dy: (_part(dy, group, -1),)


@differentiable
def gather_sequence(x: Tensor, group: Group):
    """Slice [s, ...] -> whole [size * s, ...], for parts of a computation; partial gradients are reduce-scattered."""
    return group.all_gather(x.contiguous()), lambda dy: (group.reduce_scatter(dy.contiguous()),)


@differentiable
def gather_sequence_repeated(x: Tensor, group: Group):
    """Slice [s, ...] -> whole [size * s, ...], for a computation that every rank repeats; gradients are cut."""
    return group.all_gather(x.contiguous()), lambda dy: (_part(dy, group, 0),)


@differentiable
def reduce_scatter_sequence(x: Tensor, group: Group):
    """Partial [size * s, ...] -> slice [s, ...] of the sum; gradients are gathered."""
    return group.reduce_scatter(x.contiguous()), lambda dy: (group.all_gather(dy.contiguous()),)
