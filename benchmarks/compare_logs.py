"""Seconds and peak memory of ``align compare`` on two long logs, in a fresh process, imports included.

Every microbatch has its own loss and its MD5, as a real log has. One line stands for one microbatch, except that
``jsonl`` adds the gradient norm of every step, as ``align run`` does, and that ``final`` and ``path`` print main
and MTP on lines of their own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from rich.table import Table

from align.losslog import loss_md5, loss_text
from benchmarks.tell import run, tell

LINES, MICROBATCHES = 1_000_000, 2
# ``align``, which then prints its peak RSS in KiB; the ru_maxrss of a child begins with the size of its parent.
PROGRAM = """
import sys
from align.cli import app
try:
    app()
except SystemExit as end:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    sys.exit(end.code)
"""
EXAMPLES = """Examples:

    python benchmarks/compare_logs.py

    python benchmarks/compare_logs.py --format jsonl --repeat 5 --json compare_logs.json
"""


def _jsonl(step: int, microbatch: int, main: tuple[str, str], mtp: tuple[str, str]) -> str:
    losses = {"main_loss": main[0], "main_md5": main[1], "mtp_loss": mtp[0], "mtp_md5": mtp[1]}
    line = json.dumps({"step": step, "microbatch": microbatch, "rank": 0} | losses) + "\n"
    last = microbatch == MICROBATCHES - 1
    return line + (json.dumps({"step": step, "grad_norm": mtp[0]}) + "\n" if last else "")


def _step(step: int, microbatch: int, main: tuple[str, str], mtp: tuple[str, str]) -> str:
    return f"step {step} mb {microbatch} loss {main[0]} md5 {main[1]} mtp {mtp[0]} md5 {mtp[1]}\n"


def _final(step: int, microbatch: int, main: tuple[str, str], mtp: tuple[str, str]) -> str:
    return "".join(f"final_loss: rank=0 val={value} md5={md5}\n" for value, md5 in (main, mtp))


def _path(step: int, microbatch: int, main: tuple[str, str], mtp: tuple[str, str]) -> str:
    return (
        f"[LOSS_PATH_MD5] rank=0 loss_sum={main[0]} loss_sum_md5={main[1]} "
        f"final_loss={main[0]} final_loss_md5={main[1]}\n"
        f"[MTP_LOSS_PATH_MD5] rank=0 mtp1.final_loss={mtp[0]} mtp1.final_loss_md5={mtp[1]}\n"
    )


FORMATS: dict[str, tuple[Callable[..., str], float]] = {  # lines per microbatch
    "jsonl": (_jsonl, 1 + 1 / MICROBATCHES), "step": (_step, 1), "final": (_final, 2), "path": (_path, 2),
}  # fmt: skip


def _losses(count: int, seed: int) -> Iterator[tuple[str, str]]:
    values = np.random.default_rng(seed).uniform(1, 7, count).astype(np.float32).tolist()
    return ((loss_text(value), loss_md5(value)) for value in values)


def write_log(path: Path, form: str, lines: int) -> int:
    """Write a log of about ``lines`` lines; returns how many microbatches it has."""
    text, per_microbatch = FORMATS[form]
    steps = int(lines / per_microbatch / MICROBATCHES)
    count = steps * MICROBATCHES
    with open(path, "w", encoding="ascii") as file:
        for index, losses in enumerate(zip(_losses(count, 0), _losses(count, 1), strict=True)):
            file.write(text(index // MICROBATCHES + 1, index % MICROBATCHES, *losses))
    return count


def measure(reference: Path, candidate: Path, microbatches: int) -> tuple[float, float, float]:
    """(seconds, seconds of processor, peak RSS in MB) of one comparison, which must find every loss equal."""
    words = [sys.executable, "-c", PROGRAM, "compare", str(reference), str(candidate), "--microbatches", "2"]
    with tempfile.TemporaryFile("w+") as told:
        start = time.perf_counter()
        pid = os.posix_spawn(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, told.fileno(), 1)])
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        told.seek(0)
        output = told.read()
    if status or f"main_matches={microbatches}/{microbatches}" not in output:
        raise SystemExit(f"the comparison went wrong:\n{output}")
    return seconds, usage.ru_utime + usage.ru_stime, int(output.split()[-1]) / 1024


def main(
    form: Annotated[list[str] | None, typer.Option("--format", help=f"Of {', '.join(FORMATS)}; all.")] = None,
    lines: Annotated[int, typer.Option(min=100, help="Lines of each log.")] = LINES,
    repeat: Annotated[int, typer.Option(min=1, help="Comparisons per format; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    columns = ("format", "MB a log", "seconds", "CPU seconds", "peak MB")
    table, figures = Table(*columns, title=f"Two logs of {lines:,} lines"), []
    for name in form or FORMATS:
        if name not in FORMATS:
            raise typer.BadParameter(f"{name} is none of {', '.join(FORMATS)}")
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"{side}.{name}" for side in ("reference", "candidate")]
            microbatches = [write_log(log, name, lines) for log in logs][0]
            runs = sorted(measure(*logs, microbatches) for _ in range(repeat))
            megabytes = logs[0].stat().st_size / 1e6
        seconds, cpu, _ = runs[len(runs) // 2]
        peak = max(run[2] for run in runs)
        row = {"format": name, "log_mb": megabytes, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}
        figures.append(row | {"lines": lines})
        table.add_row(name, f"{megabytes:.0f}", f"{seconds:.2f}", f"{cpu:.2f}", f"{peak:.0f}")
    tell(table, figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
