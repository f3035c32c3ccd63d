"""Rows to the ranks that hold their experts, and back. The layer is given one of these when it is built."""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle
from paddle import Tensor

from paddledsv4.distributed.collectives import all_to_all
from paddledsv4.distributed.group import Group, counts
from paddledsv4.transformer.build import Build

Assignments = Callable[[Tensor], Tensor]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def dispatcher(build: Build) -> Callable[[Experts, Tensor, Tensor, Tensor], Tensor]:
    """The dispatcher for the groups of this build."""
    groups = build.groups
    if groups.expert.size > 1:
        return AllToAllDispatcher(build.ops, groups.expert)
    return local_dispatch if groups.context.size == 1 else SliceDispatcher(build.ops, groups.context)


def own_assignments(build: Build) -> Assignments:
    """Which of the assignments in a routing map [T, E] this rank sends to the experts.

    All of them, if experts are split over the same tensor ranks as everything else. If over fewer, tensor ranks, who
    all know the same tokens, share them out.
    """
    tensor, split = build.groups.tensor, build.groups.expert_tensor.size
    shares, mine = tensor.size // split, tensor.rank // split
    return all_assignments if shares == 1 else functools.partial(assignments_of_share, shares=shares, mine=mine)


def all_assignments(routing_map: Tensor) -> Tensor:
    """[T, E] -> [T, E]."""
    return routing_map


def assignments_of_share(routing_map: Tensor, shares: int, mine: int) -> Tensor:
    """[T, E] -> [T, E], false outside the consecutive tokens that are share number ``mine``."""
    tokens = routing_map.shape[0]
    return routing_map & (paddle.arange(tokens) * shares // tokens == mine).unsqueeze(1)


def local_dispatch(experts: Experts, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """All experts are here. rows [n, C] grouped by expert, probs [n], tokens_per_expert [E] -> [n, C]."""
    return experts(rows, probs, tokens_per_expert)


class SliceDispatcher:
    """All experts are here, but only a slice of the sequence.

    GEMMs of very few rows run on other kernels, with other bits (MKL: below 4 rows). So an expert gets zeros as
    further rows, up to the number that it had with the whole sequence or to 4: its tokens have the bits of one card.
    """

    ROWS = 4

    def __init__(self, ops, group: Group):
        self.ops, self.group = ops, group

    def __call__(self, experts: Experts, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """As :func:`local_dispatch`; tokens_per_expert counts this slice's."""
        whole = self.group.all_reduce_(tokens_per_expert.clone())
        more = (whole.clip(max=self.ROWS) - tokens_per_expert).clip(min=0)
        rows, probs = self._extend(rows, tokens_per_expert, more), self._extend(probs, tokens_per_expert, more)
        out = experts(rows, probs, tokens_per_expert + more)
        sizes = counts(paddle.stack([tokens_per_expert, more], 1).flatten())
        return self.ops.concat_rows(*self.ops.split_rows(out, sizes)[::2])

    def _extend(self, rows: Tensor, sizes: Tensor, more: Tensor) -> Tensor:
        """Blocks of so many rows, zeros behind each."""
        empty = (paddle.zeros([n, *rows.shape[1:]], rows.dtype) for n in counts(more))
        blocks = zip(self.ops.split_rows(rows, counts(sizes)), empty, strict=True)
        return self.ops.concat_rows(*(x for pair in blocks for x in pair))


class AllToAllDispatcher:
    """Every rank sends each row to the rank that holds its expert (spec 9.4).

    A rank gets blocks by source rank, each grouped by expert; they are regrouped by expert, ascending source ranks
    inside, so that an expert's weight gradient is one GEMM over the tokens of all ranks in that order. Rows are only
    split and concatenated: nothing is added, and the way back is the inverse.
    """

    def __init__(self, ops, group: Group):
        self.ops, self.group = ops, group

    def __call__(self, experts: Experts, rows: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """rows [n, C] grouped by expert (over all E), probs [n], tokens_per_expert [E] -> [n, C]."""
        ranks, group = self.group.size, self.group
        everywhere = group.all_gather(tokens_per_expert).reshape([ranks, ranks, -1])  # source, owner, expert there
        here = everywhere[:, group.rank]
        send, receive = counts(everywhere[group.rank].sum(1)), counts(here.sum(1))
        rows = all_to_all(rows, group=group, send=send, receive=receive)
        probs = all_to_all(probs, group=group, send=send, receive=receive)
        rows, probs = self._transpose(rows, here), self._transpose(probs, here)
        out = self._transpose(experts(rows, probs, here.sum(0)), here.t())
        return all_to_all(out, group=group, send=receive, receive=send)

    def _transpose(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Blocks of rows in the order (i, j), sizes [I, J], into the order (j, i)."""
        outer, inner = sizes.shape
        blocks = self.ops.split_rows(rows, counts(sizes.flatten()))
        return self.ops.concat_rows(*(blocks[i * inner + j] for j in range(inner) for i in range(outer)))
