"""What a family of kernels tells benchmarks/kernels.py: one :class:`Case` a kernel, size and direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One thing to time. Everything that ``ours`` reads is on the GPU before the case is made.

    Attributes:
        name: kernel, direction and size, such as "sparse attention, backward, 4096".
        ours: runs the kernel once and returns its output(s); allocating them is part of it.
        bound: what limits it, and so which ceiling it is held against: "flops" (the measured bf16 GEMM) or "bytes"
            (the measured copy).
        work: floating-point operations, or bytes that must move (each input read once, each output written once).
        check: the largest ``relative_error`` of the outputs against float64 or float32; it runs ``ours`` itself, on
            poisoned memory where that is cheap. At most ``limit``.
        unfused: the same in plain torch operations; None where it does not fit the device.
        peers: name of a library -> what imports it, prepares its inputs and returns what to time. A library that is
            not there raises ImportError: "not carried". Another exception is printed as the reason.
        alone: the peers that are timed in a process of their own: one is known to hang, one keeps what memory it had.
        graph: replay a captured CUDA graph; False for what synchronises.
        goal: the share of the ceiling (or, with ``rival``, of that peer's rate) that the kernel has to reach.
        rival: the peer, or "fastest peer", that ``goal`` is about.
    """

    name: str
    ours: Run
    bound: Literal["flops", "bytes"]
    work: float
    check: Callable[[], float]
    limit: float
    unfused: Run | None = None
    peers: Mapping[str, Callable[[], Run]] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    graph: bool = True
    goal: float | None = None
    rival: str | None = None


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64; NaN where anything is NaN."""
    truth = truth.double()
    return (torch.linalg.vector_norm(ours.double() - truth) / torch.linalg.vector_norm(truth)).item()


def worst(pairs) -> float:
    """The largest relative error of (ours, truth) pairs; NaN if one is."""
    errors = [relative_error(ours, truth) for ours, truth in pairs]
    return max(errors) if all(error == error for error in errors) else float("nan")
