"""Join the ranks of a layout, and make sure that they all mean the same run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import paddle

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.distributed.launch import Launch
from paddledsv4.distributed.topology import group_of, rank_groups
from paddledsv4.errors import UserError


@contextlib.contextmanager
def connect(parallel: ParallelConfig, launch: Launch | None = None) -> Iterator[Groups]:
    """The groups of this rank, for the length of a ``with`` block. One rank alone connects to nothing.

    An error that leaves the block is told to the other ranks, which then stop as well.

    Raises:
        UserError: another number of processes than the layout has ranks, a layout that is not built, ranks that do
            not meet or that were given different layouts.
    """
    launch = launch or Launch.from_env()
    kinds = rank_groups(parallel)
    if launch.world_size != parallel.world_size:
        raise UserError(
            f"parallel.world_size = {parallel.world_size}, but {launch.world_size} process"
            f"{'es were' if launch.world_size > 1 else ' was'} started: start {parallel.world_size} with "
            f"python -m paddle.distributed.launch --nproc_per_node {parallel.world_size} ..."
        )
    if parallel.world_size == 1:
        yield ALONE
        return
    backend = _backend(launch, parallel.timeout)
    try:
        check_same(backend.world(), {"parallel": parallel.model_dump_json()})
        yield join(backend, kinds, launch.rank)
    except BaseException as error:
        if hasattr(backend, "watchdog"):
            backend.watchdog.fail(" ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        backend.close()


def _backend(launch: Launch, timeout: int):
    if paddle.device.is_compiled_with_cuda() and paddle.device.get_device().startswith("gpu"):
        from paddledsv4.distributed.native import NativeBackend

        return NativeBackend(launch, timeout)
    try:
        from paddledsv4.distributed.gloo import GlooBackend
    except ImportError:
        raise UserError('many ranks on a CPU talk through torch: pip install "paddledsv4[torch]"') from None
    return GlooBackend(launch, timeout)


def join(backend, kinds: dict[str, list[tuple[int, ...]]], rank: int) -> Groups:
    """Make every group once, in one order on all ranks. Groups of the same ranks share one; groups of one are alone."""
    world = backend.world()
    made: dict[tuple[int, ...], Group | None] = {world.ranks: world}
    joined = {}
    for name, groups in kinds.items():
        for ranks in groups:
            if ranks not in made:
                made[ranks] = backend.group(name, ranks) if len(ranks) > 1 else Group(name, ranks)
        joined[name] = made[group_of(rank, groups)]
    return Groups(**joined)


def check_same(group: Group, texts: Mapping[str, str | bytes]) -> None:
    """Compare what every rank of the group holds under each name.

    Raises:
        UserError: on every rank of the group, if some rank differs; it names what differs and where.
    """
    digests = [hashlib.md5(t.encode() if isinstance(t, str) else t).digest() for t in texts.values()]
    mine = paddle.to_tensor(np.frombuffer(b"".join(digests), np.uint8).copy())
    everyone = group.all_gather(mine).numpy().reshape(group.size, len(digests), 16)
    for index, name in enumerate(texts):
        odd = [rank for rank, theirs in zip(group.ranks, everyone, strict=True)
               if (theirs[index] != everyone[0][index]).any()]
        if odd:
            raise UserError(
                f"{name} of rank {', '.join(map(str, odd))} differs from that of rank {group.ranks[0]}: "
                "start every rank with the same command, files and environment"
            )


MESSAGE = 1000  # bytes of a problem that are told to other ranks


def fail_together(group: Group, problem: str | None) -> None:
    """What one rank of the group could not do stops all of them. Every rank calls this, most with None.

    Raises:
        UserError: on every rank of the group, if one has a ``problem``: the first one's.
    """
    text = np.frombuffer((problem or "").encode()[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8)
    everyone = group.all_gather(paddle.to_tensor(text.copy())).numpy().reshape(group.size, MESSAGE)
    for rank, said in zip(group.ranks, everyone, strict=True):
        if said[0]:
            words = said.tobytes().rstrip(b"\0").decode(errors="ignore")
            raise UserError(words if group.size == 1 else f"rank {rank}: {words}")
