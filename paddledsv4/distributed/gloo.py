"""Groups on a CPU: torch.distributed's gloo. The only module of ``distributed`` to import torch.

Paddle's own gloo has no all-to-all and no reduce-scatter, and its sub-groups race. Megatron's references were
recorded on this backend; its ring all-reduce adds in an order that depends on the position in the buffer.

gloo works on copies that torch owns, never on Paddle's memory itself. Its threads drop their references to a tensor
some time after the collective, and dropping the last one to borrowed memory takes a lock of Paddle's: when this
thread waits for Python's lock, and the main thread holds that one and waits for Paddle's, both wait for ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from paddle import Tensor

from paddledsv4.distributed.group import Group, empty_rows
from paddledsv4.distributed.launch import Launch
from paddledsv4.distributed.watchdog import Watchdog
from paddledsv4.errors import UserError
from paddledsv4.numerics.torch_kernels import to_torch

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class GlooGroup(Group):
    """A group over a process group of torch."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, handle, watchdog: Watchdog):
        super().__init__(name, ranks, rank)
        self.handle, self.watchdog = handle, watchdog

    @contextlib.contextmanager
    def _guard(self, operation: str) -> Iterator[None]:
        """Turn the backend's failure, whatever it is, into one sentence."""
        start = time.monotonic()
        try:
            with self.watchdog.waiting(f"{operation} among ranks {_listed(self.ranks)}"):
                yield
        except RuntimeError as error:
            raise UserError(self.watchdog.explain(operation, time.monotonic() - start, error)) from None

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        if not x.is_contiguous():
            raise ValueError("all_reduce_ works in place and needs a contiguous tensor")
        with self._guard("all_reduce"):
            copy = _copied(x)
            dist.all_reduce(copy, OPERATIONS[op], group=self.handle)
        to_torch(x).copy_(copy)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return self._into(self.size * x.shape[0], x, "all_gather", dist.all_gather_into_tensor)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._into(x.shape[0] // self.size, x, "reduce_scatter", dist.reduce_scatter_tensor)

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        splits = {"output_split_sizes": receive, "input_split_sizes": send}
        return self._into(sum(receive), x, "all_to_all", dist.all_to_all_single, **splits)

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        with self._guard("broadcast"):
            copy = _copied(x)
            dist.broadcast(copy, self.ranks[source], group=self.handle)
        to_torch(x).copy_(copy)
        return x

    def _into(self, rows: int, x: Tensor, name: str, collective: Callable, **splits: list[int]) -> Tensor:
        """A collective from x to a new tensor with so many rows."""
        out = empty_rows(rows, x)
        with self._guard(name):
            copy = _copied(x)
            result = copy.new_empty([rows, *copy.shape[1:]])
            collective(result, copy, group=self.handle, **splits)
        to_torch(out).copy_(result)
        return out

    def barrier(self) -> None:
        with self._guard("barrier"):
            dist.barrier(group=self.handle)


class GlooBackend:
    """The process groups of this process.

    Args:
        launch: rank, world size and where the ranks meet.
        timeout: seconds that a rank waits for the others, at the start and in every collective.

    Raises:
        UserError: the ranks do not find each other in time.
    """

    def __init__(self, launch: Launch, timeout: int):
        self.launch, self.limit = launch, timedelta(seconds=timeout)
        try:
            store = dist.TCPStore(launch.host, launch.port, launch.world_size, launch.rank == 0, self.limit)
            self.watchdog = Watchdog(launch, timeout, store, self._client)
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", store), rank=launch.rank, world_size=launch.world_size,
                timeout=self.limit,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {launch.rank}: not all of {launch.world_size} ranks met at {launch.host}:{launch.port} within "
                f"{timeout} s ({_first_line(error)}); see the logs of the others"
            ) from None

    def _client(self):
        return dist.TCPStore(self.launch.host, self.launch.port, None, False, self.limit)

    def world(self) -> Group:
        """The group of all ranks."""
        launch = self.launch
        return GlooGroup("world", range(launch.world_size), launch.rank, dist.group.WORLD, self.watchdog)

    def group(self, name: str, ranks: Sequence[int]) -> Group | None:
        """Make a group; every rank of the world calls this for every group. None on a rank outside of it."""
        handle = dist.new_group(list(ranks), timeout=self.limit, backend="gloo")
        if self.launch.rank not in ranks:
            return None
        return GlooGroup(name, ranks, list(ranks).index(self.launch.rank), handle, self.watchdog)

    def close(self) -> None:
        """Leave. Others that still wait for this rank get an error."""
        self.watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _copied(x: Tensor) -> torch.Tensor:
    return to_torch(x).clone()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
