"""Why a kernel takes the time that it takes: Nsight Compute's counters of chosen cases, as a table."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

EXAMPLES = """Examples:

    ncu --set full --profile-from-start off --clock-control none --csv --page raw --log-file counters.csv \\
        python benchmarks/kernels_profile.py run --only "sparse attention, backward, 4096"

    python benchmarks/kernels_profile.py table counters.csv
"""
# heading -> the counters' names, the largest of those that are there
SHARES = {
    "copy": r"(gpu__dram_throughput|dram__throughput)\..*pct_of_peak_sustained_elapsed",
    "L2": r"lts__throughput\..*pct_of_peak_sustained_elapsed",
    "L1, shared": r"l1tex__throughput\..*pct_of_peak_sustained_(active|elapsed)",
    "tensor": r"sm__(inst_executed_)?pipe_tensor.*\.avg\.pct_of_peak_sustained_active",
    "issue": r"(smsp__issue_active|sm__inst_issued)\.avg\.pct_of_peak_sustained_active",
    "warps": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
}
STALL = re.compile(r"smsp__average_warps?_(?:issue_stalled|latency_issue_stalled)_(\w+?)(?:_per_issue_active)?\.ratio")
app = typer.Typer(add_completion=False, rich_markup_mode=None, help=__doc__, epilog=EXAMPLES)


@app.command()
def run(
    only: Annotated[str, typer.Option(help="Cases whose name has one of these texts, separated by semicolons.")],
    family: Annotated[str, typer.Option(help="Which kernels, separated by commas.")] = "mhc,attn,gemm",
    quick: Annotated[bool, typer.Option(help="The shorter sequence only.")] = True,
) -> None:
    """Runs each chosen case once between the marks that the profiler waits for, after two runs that compile it."""
    import torch

    from benchmarks.kernel_timing import clean

    cudart = torch.cuda.cudart()
    for name in family.split(","):
        for case in importlib.import_module(f"benchmarks.kernels_{name}").cases(quick):
            if any(text in case.name for text in only.split(";")):
                case.ours(), case.ours()
                torch.cuda.synchronize()
                print(case.name, flush=True)
                cudart.cudaProfilerStart()
                case.ours()
                torch.cuda.synchronize()
                cudart.cudaProfilerStop()
            del case
            clean()


def rows_of(path: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The kernels' counters, and the unit of each."""
    lines = path.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise typer.BadParameter(f"{path} has no table of counters; its last line: {lines[-1] if lines else ''}")
    found = list(csv.DictReader(lines[start:]))
    return found[1:], found[0]


def microseconds(row: dict[str, str], units: dict[str, str]) -> float:
    scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6}
    return number(row["gpu__time_duration.sum"]) * scale[units["gpu__time_duration.sum"]]


def number(text: str) -> float:
    return float(text.replace(",", "")) if text else float("nan")


@app.command()
def table(
    files: list[Path], all_names: Annotated[bool, typer.Option(help="List the counters' names.")] = False
) -> None:
    """One line a kernel: time, registers, shares of the peaks, and what its warps waited for."""
    print("| kernel | us | grid | registers | shared KB | " + " | ".join(SHARES) + " | warps wait for |")
    print("|---" * (6 + len(SHARES)) + "|")
    for path in files:
        rows, units = rows_of(path)
        for row in rows:
            if all_names:
                print("\n".join(f"{key} = {value} {units[key]}" for key, value in row.items()))
            shares = []
            for pattern in SHARES.values():
                values = [number(v) for k, v in row.items() if k and re.fullmatch(pattern, k) and v]
                shares.append(f"{max(values):.0f} %" if values else "-")
            stalls = {}
            for key, value in row.items():
                match = STALL.fullmatch(key or "")
                if match and value:
                    stalls[match[1]] = max(number(value), stalls.get(match[1], 0.0))
            worst = sorted(stalls, key=stalls.get, reverse=True)[:4]
            waits = ", ".join(f"{name.replace('_', ' ')} {stalls[name]:.1f}" for name in worst)
            name = re.sub(r"\(.*", "", row["Kernel Name"])
            shared = next((v for k, v in row.items() if k and "shared_mem_per_block_dynamic" in k), "-")
            print(f"| {name} | {microseconds(row, units):.1f} | {row['Grid Size']} | "
                  f"{row.get('launch__registers_per_thread', '-')} | {shared} | {' | '.join(shares)} | {waits} |")


if __name__ == "__main__":
    app()
