"""Marginal time of a run in a graph, beside reads that empty the L2 cache."""
import torch
from statistics import median
FLUSH = 256 << 20
_state = {}
def _flush():
    if not _state:
        _state["c"] = torch.ones(FLUSH // 4, device="cuda"); _state["o"] = torch.empty((), device="cuda")
    torch.sum(_state["c"], dim=0, out=_state["o"])
def graph_of(f, n):
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): f()
    torch.cuda.current_stream().wait_stream(side)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    return g
def timed(g):
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record(); g.replay(); b.record(); torch.cuda.synchronize(); return a.elapsed_time(b)
def marginal(run, n=10, times=7):
    _flush(); run(); torch.cuda.synchronize()
    def both(): _flush(); run()
    p, q = graph_of(both, n), graph_of(_flush, n)
    timed(p), timed(q)
    x = [timed(p) - timed(q) for _ in range(times)]
    return median(x) / n
