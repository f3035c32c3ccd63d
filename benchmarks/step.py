"""Seconds, tokens per second and memory of one training step, beside Hugging Face transformers' DeepSeek-V4.

Forward, backward, clipping and AdamW in fp32, on the same tokens and from the same weights. Each engine runs in
its own process and the engines take turns step by step, so a busy machine slows both alike. The peer runs as
installed and once more under our malloc settings, which help it too. A row of the peer carries ours / theirs
of the medians: below 1 we are faster.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setup import Setup
from benchmarks.worker import Worker, serve

EXAMPLES = """Examples:

    python benchmarks/step.py

    python benchmarks/step.py --size 256,256,2 --steps 30 --json step.json

    python benchmarks/step.py --numerics hf     (our losses then follow theirs)

    python benchmarks/step.py --threads 2 --no-extra
"""


@dataclass(frozen=True)
class Row:
    """One engine at one size, measured."""

    setup: Setup
    parameters: int
    steps: list[dict]

    def figures(self) -> dict:
        wall, cpu = ([step[clock] for step in self.steps] for clock in ("wall", "cpu"))
        return {
            **self.setup.as_dict(), "label": self.setup.label, "parameters": self.parameters,
            "wall_median": median(wall), "wall_min": min(wall), "cpu_median": median(cpu), "cpu_min": min(cpu),
            "tokens_per_second": self.setup.batch * self.setup.sequence / median(wall),
            "peak_mb": self.steps[-1]["peak_mb"], "steps": self.steps,
        }  # fmt: skip


def measure(setups: list[Setup], steps: int, warmup: int) -> list[dict]:
    """Let the engines take turns; the first ``warmup`` steps of each are dropped."""
    with ExitStack() as stack:
        workers, parameters = [], []
        for setup in setups:  # one after another: the peer writes the weights that ours reads
            workers.append(Worker(setup))
            stack.callback(workers[-1].close)
            parameters.append(workers[-1].wait()["parameters"])
        results = [[] for _ in workers]
        for number in range(1, warmup + steps + 1):
            for result, worker in zip(results, workers, strict=True):
                result.append(worker.step(number))
    rows = zip(setups, parameters, results, strict=True)
    return [Row(setup, count, result[warmup:]).figures() for setup, count, result in rows]


def compare(rows: list[dict]) -> None:
    """Give every row of the peer the ratios of ours, on the same losses, to it."""
    ours = next(row for row in rows if row["engine"] == "paddledsv4" and not row["losses"])
    for row in rows:
        if row["engine"] == "transformers":
            keys = ("wall_median", "wall_min", "cpu_median", "cpu_min", "peak_mb")
            row["ratio"] = {key: ours[key] / row[key] for key in keys}


def table(rows: list[dict], steps: int, threads: int) -> Table:
    """The figures of all sizes."""
    result = Table(title=f"One training step: fp32, {threads} thread(s), {steps} steps after warm-up")
    for name in ("size h,s,b", "engine"):
        result.add_column(name)
    for name in ("params", "wall med", "wall min", "cpu med", "cpu min", "tok/s", "peak MB", "loss", "ours/HF cpu",
                 "wall", "mem"):  # fmt: skip
        result.add_column(name, justify="right")
    size = None
    for row in rows:
        this = f"{row['hidden']},{row['sequence']},{row['batch']}"
        if size not in (None, this):
            result.add_section()
        ratio = row.get("ratio")
        cells = [f"{ratio[key]:.2f}" for key in ("cpu_median", "wall_median", "peak_mb")] if ratio else [""] * 3
        seconds = [f"{row[key]:.3f}" for key in ("wall_median", "wall_min", "cpu_median", "cpu_min")]
        result.add_row(
            "" if this == size else this, row["label"], f"{row['parameters'] / 1e6:.2f} M", *seconds,
            f"{row['tokens_per_second']:.0f}", f"{row['peak_mb']:.0f}", f"{row['steps'][-1]['loss']:.4f}", *cells,
        )  # fmt: skip
        size = this
    return result


def parse_size(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not three positive numbers: hidden,sequence,batch")
    return tuple(int(part) for part in parts)


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(help=__doc__.strip(), epilog=EXAMPLES)
def main(
    size: Annotated[list[str], typer.Option(help="hidden,sequence,batch; may be repeated")] = (
        "256,256,2", "512,512,2"),
    steps: Annotated[int, typer.Option(min=1, help="Steps measured per engine.")] = 12,
    warmup: Annotated[int, typer.Option(min=1, help="Steps dropped at the start.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each engine.")] = 1,
    numerics: Annotated[str, typer.Option(help="Our numeric preset: paddle, plain or hf.")] = "paddle",
    peer: Annotated[bool, typer.Option(help="Measure Hugging Face beside us, where installed.")] = True,
    peer_host: Annotated[bool, typer.Option(help="Also the peer under our malloc settings (host.py).")] = True,
    extra: Annotated[bool, typer.Option(help="Also ours with the losses that Hugging Face has not.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if worker:
        serve(Setup(**json.loads(worker)))
        return
    from benchmarks.peers import missing_peer

    console = Console(width=None if sys.stdout.isatty() else 160)
    absent = missing_peer() if peer else "The peer was not asked for."
    if absent:
        console.print(absent)
    rows = []
    for hidden, sequence, batch in map(parse_size, size):
        with tempfile.TemporaryDirectory() as folder:
            ours = Setup("paddledsv4", hidden, sequence, batch, threads, numerics=numerics)
            setups = [replace(ours, losses=True)] if extra else []
            if absent:
                setups.insert(0, ours)
            else:
                ours = replace(ours, weights=f"{folder}/weights.safetensors")
                theirs = replace(ours, engine="transformers")
                tuned = [replace(theirs, peer_host=True, weights=None)] if peer_host else []
                setups = [theirs, ours, *tuned, *setups]
            found = measure(setups, steps, warmup)
        compare(found)
        rows += sorted(found, key=lambda row: (row["losses"], row["engine"], row["peer_host"]))
    console.print(table(rows, steps, threads))
    if json_file:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.platform()}
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        console.print(f"Written to {json_file}")


if __name__ == "__main__":
    app()
