"""What every layout sends, against the least it has to, and how fast it goes on this machine.

Each layout trains the same global batch of four sequences in processes of its own on gloo. Bytes are counted where
layers ask for collectives (``benchmarks/traffic.py``), of all ranks together, per token of the global batch. Beside
them stand what ``benchmarks/layout_bytes.py`` predicts, and the least that any implementation of the layout would
send. tokens/s say little here: the ranks share the cores of one machine.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.console import Console
from rich.table import Table

from align.bundle import load_bundle
from benchmarks.layout_bytes import Job, least, sent
from benchmarks.ranks import run_ranks
from paddledsv4.config import ParallelConfig
from paddledsv4.errors import UserError

EXAMPLES = """Examples:

    python benchmarks/parallel.py

    python benchmarks/parallel.py --layouts dp2,ep2,tp2-sp,cp2 --steps 5

    python benchmarks/parallel.py --bundle ../shared/reference/seq1k-fp32 --json parallel.json
"""
DEFAULT = "dp1,dp2,ep2,tp2,tp2-sp,cp2,dp4,ep4,ep2-tp2,ep2-cp2"


def layout(text: str) -> ParallelConfig:
    """``ep2-tp2-sp`` -> data 2, expert 2, tensor 2, sequence parallel. ``et1``: experts are not split.

    Raises:
        UserError: a part that is none of dpN, epN, tpN, etN, cpN and sp.
    """
    sizes, sequence_parallel = {"dp": 0, "ep": 1, "tp": 1, "cp": 1, "et": 0}, False
    for part in text.split("-"):
        if part == "sp":
            sequence_parallel = True
        elif (found := re.fullmatch(r"(dp|ep|tp|cp|et)(\d+)", part)) and int(found[2]):
            sizes[found[1]] = int(found[2])
        else:
            raise UserError(f"layout {text!r}: {part!r} is none of dpN, epN, tpN, etN, cpN and sp")
    data = sizes["dp"] or sizes["ep"]
    return ParallelConfig(
        world_size=data * sizes["tp"] * sizes["cp"], data=data, expert=sizes["ep"], tensor=sizes["tp"],
        context=sizes["cp"], expert_tensor=sizes["et"] or None, sequence_parallel=sequence_parallel,
    )  # fmt: skip


def measure(bundle: str, parallel: ParallelConfig, steps: int) -> dict:
    """Seconds a step, tokens, and bytes by kind of group that all ranks together send in a step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rank"
        run_ranks(parallel.world_size, [bundle, parallel.model_dump_json(), str(steps), str(file)])
        ranks = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(parallel.world_size)]
    total: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for kind, _, size in rank["sent"]:
            total[kind] += size
    return {**ranks[0], "sent": dict(total)}


def main(
    layouts: Annotated[str, typer.Option(help="With commas; of dpN, epN, tpN, etN, cpN, sp joined by -")] = DEFAULT,
    bundle: Annotated[str, typer.Option(help="Bundle whose model, weights and tokens are used.")] = "tiny-fp32",
    steps: Annotated[int, typer.Option(min=1, help="Steps measured, after one that is not.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Bytes and tokens/s of parallel layouts."""
    console, rows = Console(width=max(Console().width, 110)), []
    recorded = load_bundle(bundle)
    shapes = {name: list(array.shape) for name, array in recorded.init().items()}
    table = Table("layout", "processes", "tokens/s", "group", "bytes/token", "predicted", "least", "sent/least")
    for text in layouts.split(","):
        parallel = layout(text)
        found = measure(bundle, parallel, steps)
        tokens, seconds = found["tokens"], median(found["seconds"])
        job = Job(recorded.model, shapes, parallel, tokens, recorded.training.sequence_length)
        expected, floor = sent(job), least(job)
        rows.append({"layout": text, **found, "predicted": expected, "least": floor})
        first = (text, str(parallel.world_size), f"{tokens / seconds:,.0f}")
        for kind in [*expected, *(k for k in found["sent"] if k not in expected)] or [""]:
            counted, low = found["sent"].get(kind, 0.0), floor.get(kind, 0.0)
            cells = [counted / tokens, expected.get(kind, 0.0) / tokens, low / tokens] if kind else []
            ratio = [f"{counted / low:.2f}" if low else "-"] if kind else []
            table.add_row(*first, kind, *(f"{cell:,.0f}" for cell in cells), *ratio)
            first = ("", "", "")
        console.print(f"{text}: {tokens / seconds:,.0f} tokens/s")
    console.print(table)
    console.print(f"{os.cpu_count()} cores; global batch of 4 sequences of {tokens // 4} tokens; float32")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog=EXAMPLES)(main)
    try:
        app(standalone_mode=True)
    except UserError as error:
        sys.exit(f"error: {error}")
