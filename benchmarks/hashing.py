"""Seconds to hash tensors with align.hashing.tensor_md5, beside hashlib.md5 on the same bytes, on one core.

The two take turns on each tensor, and the fastest of each counts: whatever else runs on the machine only adds.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from rich.table import Table

from align.hashing import tensor_md5
from benchmarks.tell import run, tell

EXAMPLES = """Examples:

    python benchmarks/hashing.py

    python benchmarks/hashing.py --repeat 50 --json hashing.json
"""
SIZES = (4, 1 << 10, 1 << 16, 1 << 20, 1 << 26)  # bytes


def _seconds(hash_it: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        hash_it()
    return (time.perf_counter() - start) / calls


def measure(size: int, repeat: int) -> tuple[float, float]:
    """The best seconds for one tensor of ``size`` bytes: (ours, hashlib's)."""
    tensor = np.random.default_rng(0).standard_normal(size // 4, np.float32)
    raw = tensor.tobytes()
    if tensor_md5(tensor) != hashlib.md5(raw).hexdigest():
        raise SystemExit("tensor_md5 is wrong")
    calls = max(1, (1 << 20) // (size + 1000))
    ours, theirs = [], []
    for _ in range(repeat):
        ours.append(_seconds(lambda: tensor_md5(tensor), calls))
        theirs.append(_seconds(lambda: hashlib.md5(raw).hexdigest(), calls))
    return min(ours), min(theirs)


def main(
    repeat: Annotated[int, typer.Option(min=1, help="Turns; the fastest counts.")] = 20,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    table, figures = Table("bytes", "tensor_md5 MB/s", "hashlib MB/s", "time, ours / hashlib's"), []
    for size in SIZES:
        ours, theirs = measure(size, repeat)
        figures.append({"bytes": size, "seconds": ours, "hashlib_seconds": theirs, "ratio": ours / theirs})
        row = (size / ours / 1e6, size / theirs / 1e6)
        table.add_row(f"{size:,}", *(f"{speed:,.1f}" for speed in row), f"{ours / theirs:.3f}")
    tell(table, figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
