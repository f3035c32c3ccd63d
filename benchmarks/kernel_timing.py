"""Milliseconds on the GPU: medians over many runs, each on a cold L2 cache, and the two ceilings of the device."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

FLUSH = 256 << 20  # bytes written between two runs, several times the L2 cache
BUDGET = 250.0  # milliseconds of runs for one median
LEAST, MOST = 3, 60  # runs for one median


def milliseconds(run: Callable, graph: bool = True) -> float:
    """Median time of ``run()``, warm, with a cold L2 cache. ``graph``: of replays of its CUDA graph."""
    run()
    torch.cuda.synchronize()
    replay = _captured(run) if graph else run
    cache = torch.empty(FLUSH // 4, dtype=torch.int32, device="cuda")
    once = _timed(replay, cache, 2)[-1]
    runs = int(min(max(BUDGET / max(once, 1e-3), LEAST), MOST))
    return median(_timed(replay, cache, runs))


def _captured(run: Callable) -> Callable:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # a library may set itself up on the stream that it finds
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept=kept):
        graph.replay()

    return replay


def _timed(run: Callable, cache: torch.Tensor, runs: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        cache.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def copy_rate() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source), graph=False) * 1e3


def gemm_rate(size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product on random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, graph=False) * 1e3
