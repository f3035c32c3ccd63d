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
    """The dispatcher for the expert group of this build."""
    group = build.groups.expert
    return local_dispatch if group.size == 1 else AllToAllDispatcher(build.ops, group)


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
