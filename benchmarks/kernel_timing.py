"""Milliseconds on the GPU: medians over many runs, each on an empty L2 cache, and the two ceilings of the device.

What a run costs where it stands among others: a CUDA graph of runs, each behind reads that empty the cache, less the
same graph without the runs. So the launch of a lone graph, 5 microseconds, is not counted, launches within a run are,
and so is whatever a run leaves to be written back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from statistics import median

import torch

FLUSH = 256 << 20  # bytes read between two runs, several times the L2 cache
GRAPH, MOST = 2.0, 10  # milliseconds of runs in a graph, and runs at most
BUDGET = 200.0  # milliseconds of runs for one median
COUNTS, WARM = (5, 60), 3  # medians are of so many replays, at least and at most, after so many more
LONG, HEAT = 5.0, 500.0  # milliseconds: a run that takes so long is first repeated for so long, until the clock that a
# hot chip keeps is reached: else who comes after a pause is a few percent faster


def milliseconds(run: Callable, graph: bool = True) -> float:
    """Median time of ``run()``, warm, on an empty L2 cache. ``graph``: as part of a CUDA graph; else launch by launch,
    for what cannot be captured."""
    return median(samples(run, graph))


def samples(run: Callable, graph: bool = True) -> Iterator[float]:
    """The times of which ``milliseconds`` is the median, each when it is measured."""
    run()
    torch.cuda.synchronize()
    if not graph:
        once = median(_timed(run, before=_flush) for _ in range(2))
        _heat(run, once)
        yield from (_timed(run, before=_flush) for _ in range(_count(once)))
        return
    once = max(_timed(_captured(run, 1).replay, before=_flush), 1e-3)
    runs = int(min(max(GRAPH / once, 1), MOST))

    def behind_flush():
        _flush()
        run()

    both, alone = _captured(behind_flush, runs), _captured(_flush, runs)
    _heat(both.replay, once * runs)
    for i in range(WARM + _count(runs * once)):
        time = _timed(both.replay) - _timed(alone.replay)
        if i >= WARM:
            yield time / runs


def _heat(run: Callable, once: float) -> None:
    if once >= LONG:
        for _ in range(int(HEAT / once)):
            run()
        torch.cuda.synchronize()


def _count(once: float) -> int:
    least, most = COUNTS
    return int(min(max(BUDGET / once, least), most))


def clean() -> None:
    """Gives back the memory that nothing holds, and cuBLAS' workspaces, of which every stream has one."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The one stream beside the default one: memory that was used on a stream serves that stream only."""
    return torch.cuda.Stream()


@functools.cache
def _cache() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(FLUSH // 4, device="cuda"), torch.empty((), device="cuda")


def _flush() -> None:
    """Reads, so that no line waits to be written back when a run begins."""
    numbers, total = _cache()
    torch.sum(numbers, dim=0, out=total)


def _captured(run: Callable, times: int) -> torch.cuda.CUDAGraph:
    side = side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _flush()
        run()  # a library may set itself up on the stream that it finds
    torch.cuda.current_stream().wait_stream(side)
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(times):
                run()
    except BaseException:
        _abandon(pool)
        torch.cuda.set_stream(stream)
        raise
    return graph


def _abandon(pool: tuple[int, int]) -> None:
    """Ends a capture that failed. torch would count it as under way, and while one is, it gives no memory back."""
    with contextlib.suppress(RuntimeError):  # the capture itself ended well
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


def _timed(run: Callable, before: Callable | None = None) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before:
        before()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def copy_rate() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source), graph=False) * 1e3


def gemm_rate(size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product on random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, graph=False) * 1e3
