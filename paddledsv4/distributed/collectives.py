"""Collectives with gradients, for layers: the loss is the sum of the losses of all ranks.

Each one's backward is a collective too, so ranks have to run the same graph. Autograd runs it in reverse order of the
forward pass, which is the same everywhere if the forward pass is.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.precision import widen


@differentiable
def all_to_all(x: Tensor, group: Group, send: list[int], receive: list[int]):
    """x [sum(send), ...] -> [sum(receive), ...], rows by source rank; the gradient travels back."""
    return group.all_to_all(x, send, receive), lambda dy: (group.all_to_all(dy.contiguous(), receive, send),)


@differentiable
def all_gather(x: Tensor, group: Group):
    """x [n, ...] -> [size * n, ...] by rank; the gradient is reduce-scattered."""
    return group.all_gather(x), lambda dy: (group.reduce_scatter(dy.contiguous()),)


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


Span = tuple[int, int]


@differentiable
def redistribute(x: Tensor, group: Group, start: int, have: list[Span], want: list[Span]):
    """Rows of a table that is spread over the ranks, to the ranks that want them.

    x holds the rows from ``start`` on. Rank r gives away rows ``have[r]`` (first and last + 1; together they are the
    table) and gets ``want[r]``, ascending. A row's gradients are summed over the ranks that got it, ascending, in
    float32 or wider.
    """
    mine, wanted = have[group.rank], want[group.rank]
    pieces = [slice(first - start, last - start) for first, last in (_common(mine, span) for span in want)]
    send = [piece.stop - piece.start for piece in pieces]
    receive = [last - first for first, last in (_common(span, wanted) for span in have)]

    def backward(dy):
        gradients, done = widen(group.all_to_all(dy.contiguous(), receive, send)), 0
        dx = paddle.zeros(x.shape, gradients.dtype)
        for piece, rows in zip(pieces, send, strict=True):
            if rows:
                dx[piece] += gradients[done : done + rows]
            done += rows
        return (dx.astype(x.dtype),)

    rows = paddle.concat([x[piece] for piece in pieces if piece.stop > piece.start] or [x[:0]], 0)
    return group.all_to_all(rows, send, receive), backward


def _common(a: Span, b: Span) -> Span:
    """What two spans share; an empty span inside ``a`` if nothing."""
    first = min(max(a[0], b[0]), a[1])
    return first, max(min(a[1], b[1]), first)
