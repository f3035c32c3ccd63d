"""The figures that benchmarks/kernels.py wrote, as the table of docs/kernels.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from benchmarks.kernels_family import Result

EXAMPLES = """Examples:

    python benchmarks/kernels.py --json kernels.json

    python benchmarks/kernels_table.py kernels.json
"""
HEAD = ["kernel", "ms", "rate", "of the ceiling", "error", "plain torch", "peers", "goal"]


def row(found: Result) -> list[str]:
    """The cells of a case."""
    if found.failure:
        return [found.name, f"failed: {found.failure}"] + [""] * (len(HEAD) - 2)
    unit, scale = ("TFLOP/s", 1e12) if found.bound == "flops" else ("GB/s", 1e9)
    torch = f"{found.ratios['unfused']:.2f} x" if "unfused" in found.ratios else "-"
    peers = "<br>".join(peer(found, name) for name in found.peers) or "-"
    return [found.name, f"{found.ms:.3f}" if found.ms < 100 else f"{found.ms:.1f}", f"{found.rate / scale:.0f} {unit}",
            f"{found.share:.0%}", f"{found.error:.1e}" + ("" if found.right else " WRONG"), torch, peers,
            found.goal or "-"]  # fmt: skip


def peer(found: Result, name: str) -> str:
    if name not in found.ratios:
        return f"{name}: {found.peers[name]}"
    remarks = [f"{found.peers[name]:.3f}, ours {found.beside[name]:.3f} ms"] if name in found.beside else []
    remarks += [found.remarks[name]] if name in found.remarks else []
    return f"{name} {found.ratios[name]:.2f} x" + (f" ({'; '.join(remarks)})" if remarks else "")


def main(path: Annotated[Path, typer.Argument(help="What benchmarks/kernels.py wrote with --json.")]) -> None:
    """A Markdown table of all cases."""
    rows = [row(Result(**case)) for case in json.loads(path.read_text())["cases"]]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in [HEAD, ["---"] * len(HEAD), *rows]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=EXAMPLES)(main)
    app()
