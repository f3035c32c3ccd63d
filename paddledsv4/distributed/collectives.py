"""Collectives with gradients, for layers: the loss is the sum of the losses of all ranks.

Each one's backward is a collective too, so ranks have to run the same graph. Autograd runs it in reverse order of the
forward pass, which is the same everywhere if the forward pass is.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.numerics.function import differentiable


@differentiable
def all_to_all(x: Tensor, group: Group, send: list[int], receive: list[int]):
    """x [sum(send), ...] -> [sum(receive), ...], rows by source rank; the gradient travels back."""
    return group.all_to_all(x, send, receive), lambda dy: (group.all_to_all(dy.contiguous(), receive, send),)


@differentiable
def all_gather(x: Tensor, group: Group):
    """x [n, ...] -> [size * n, ...] by rank; the gradient is reduce-scattered."""
    return group.all_gather(x), lambda dy: (group.reduce_scatter(dy.contiguous()),)


@differentiable
def gather_constants(x: Tensor, group: Group):
    """x [n, ...] -> [size * n, ...] by rank; only this rank's own rows get a gradient, and nothing is sent for it."""
    own = slice(group.rank * x.shape[0], (group.rank + 1) * x.shape[0])
    return group.all_gather(x), lambda dy: (dy[own],)


@differentiable
def reduce_scatter(x: Tensor, group: Group):
    """x [size * n, ...] -> [n, ...], summed over ranks; the gradient is gathered."""
    return group.reduce_scatter(x), lambda dy: (group.all_gather(dy.contiguous()),)


@differentiable
def all_reduce(x: Tensor, group: Group):
    """x of any shape -> its sum over ranks; the gradient is summed over ranks too."""
    return group.all_reduce_(x.clone()), lambda dy: (group.all_reduce_(dy.clone()),)


@differentiable
def broadcast(x: Tensor, group: Group, source: int = 0):
    """x of any shape -> that of member ``source``, whose gradient is the sum over ranks; the others' is zero."""

    def backward(dy):
        total = group.all_reduce_(dy.clone())
        return (total if group.rank == source else paddle.zeros_like(total),)

    return group.broadcast_(x.clone(), source), backward
