"""Which ranks work together, in Megatron's rank order.

Ranks form a grid whose fastest index is the tensor rank, then the context rank, then the data rank; so rank 5 of
data 2 x context 2 x tensor 2 is data 1, context 0, tensor 1. Experts live on a second grid over the same ranks, whose
indices, fastest first, are expert tensor (ranks that split the same experts), expert, and expert data (ranks that hold
the same). As in Megatron an expert is split over as many ranks as the dense layers, unless the layout says otherwise.
"""

from __future__ import annotations

from paddledsv4.config import ParallelConfig

Ranks = tuple[int, ...]


def rank_groups(parallel: ParallelConfig) -> dict[str, list[Ranks]]:
    """Name of a kind of group -> all groups of that kind, each a tuple of ascending ranks.

    ``world``: everyone. ``tensor``, ``context``, ``data``: ranks that differ in that index alone. ``replicas``: ranks
    with the same dense parameters, that is, ranks that differ in data and context. ``expert_tensor``: ranks that split
    the same experts. ``expert``: ranks that together hold all experts, or the same part of each. ``expert_shards``:
    ranks of these two kinds, each with other expert parameters. ``expert_data``: ranks with the same expert parameters.

    Raises:
        UserError: pipeline parallelism, which is not built.
    """
    if parallel.pipeline > 1:
        parallel.reject("pipeline", "must be 1: pipeline parallelism is not built; use data and expert parallelism")
    dense = {"tensor": parallel.tensor, "context": parallel.context, "data": parallel.data}
    experts = {"expert_tensor": parallel.expert_tensor_size, "expert": parallel.expert}
    experts["expert_data"] = parallel.world_size // (parallel.expert_tensor_size * parallel.expert)
    return {
        "world": [tuple(range(parallel.world_size))],
        "replicas": _groups(dense, ("context", "data")),
        **{name: _groups(dense, (name,)) for name in dense},
        **{name: _groups(experts, (name,)) for name in experts},
        "expert_shards": _groups(experts, ("expert_tensor", "expert")),
    }


def group_of(rank: int, groups: list[Ranks]) -> Ranks:
    """The one group that holds ``rank``."""
    return next(ranks for ranks in groups if rank in ranks)


def _groups(sizes: dict[str, int], varying: tuple[str, ...]) -> list[Ranks]:
    """Ranks of a grid (``sizes`` from the fastest index to the slowest) that agree in all indices but ``varying``."""
    world = 1
    for size in sizes.values():
        world *= size
    found: dict[tuple, list[int]] = {}
    for rank in range(world):
        rest, fixed = rank, []
        for name, size in sizes.items():
            rest, index = divmod(rest, size)
            if name not in varying:
                fixed.append(index)
        found.setdefault(tuple(fixed), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]
