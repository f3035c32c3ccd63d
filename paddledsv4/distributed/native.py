"""Groups on GPUs: paddle.distributed on NCCL. Written for it, not yet run on it."""

from __future__ import annotations

from collections.abc import Sequence

import paddle.distributed as dist
from paddle import Tensor

from paddledsv4.distributed.group import Group, empty_rows
from paddledsv4.distributed.launch import Launch

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class NativeGroup(Group):
    """A group over a process group of Paddle."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, handle):
        super().__init__(name, ranks, rank)
        self.handle = handle

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        dist.all_reduce(x, OPERATIONS[op], group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = empty_rows(self.size * x.shape[0], x)
        dist.stream.all_gather(out, x, group=self.handle)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = empty_rows(x.shape[0] // self.size, x)
        dist.stream.reduce_scatter(out, x, group=self.handle)
        return out

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = empty_rows(sum(receive), x)
        dist.alltoall_single(out, x, in_split_sizes=send, out_split_sizes=receive, group=self.handle)
        return out

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(x, self.ranks[source], group=self.handle)
        return x

    def barrier(self) -> None:
        dist.barrier(group=self.handle)


class NativeBackend:
    """The process groups of this process; NCCL's own watchdog ends waits that are too long."""

    def __init__(self, launch: Launch, timeout: int):
        self.launch = launch
        dist.init_parallel_env()

    def world(self) -> Group:
        """The group of all ranks."""
        return NativeGroup("world", range(self.launch.world_size), self.launch.rank, None)

    def group(self, name: str, ranks: Sequence[int]) -> Group | None:
        """Make a group; every rank of the world calls this for every group. None on a rank outside of it."""
        handle = dist.new_group(list(ranks), backend="nccl")
        if self.launch.rank not in ranks:
            return None
        return NativeGroup(name, ranks, list(ranks).index(self.launch.rank), handle)

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()
