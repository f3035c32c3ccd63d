"""Seconds of a training step under each numerics preset, and the ten operations that cost most.

The presets take turns step by step in one process, so a busy machine slows all alike; ``ratio`` compares medians
with the preset given first. The cost of an operation is found apart: its calls of one step are recorded with their
arguments and gradients and run again, forward and backward, alone.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.console import Console
from rich.table import Table

from align.bundle import Bundle, load_bundle
from paddledsv4.host import prepare_host

EXAMPLES = """Examples:

    python benchmarks/numerics.py

    python benchmarks/numerics.py --presets torch,paddle --bundle tiny-bf16 --steps 5

    python benchmarks/numerics.py --ops paddle --top 20 --json numerics.json
"""
WARM_UP = 3  # steps in which allocators and kernels settle


@dataclass
class OpCost:
    """One op in one step: calls, and milliseconds of all of them together."""

    op: str
    calls: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def step_times(bundle: Bundle, presets: list[str], steps: int) -> dict[str, list[float]]:
    """preset -> seconds of ``steps`` steps after the warm-up."""
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.training.trainer import Trainer

    state, total = bundle.init(), WARM_UP + steps
    runs, seconds = {}, {}
    for preset in presets:
        trainer = Trainer(bundle.model, bundle.training, Policy.preset(preset), bundle.tokens, state)
        runs[preset], seconds[preset] = trainer.train(total), []
    for _ in range(total):
        for preset, run in runs.items():
            seconds[preset].append(next(run).seconds)
    return {preset: times[WARM_UP:] for preset, times in seconds.items()}


def op_costs(bundle: Bundle, preset: str, repeats: int) -> list[OpCost]:
    """Every op of one microbatch and one update, dearest first; the median of ``repeats`` for each call."""
    from align.ulps import record_step
    from paddledsv4.model import DTYPES
    from paddledsv4.numerics.bfloat16 import needs_emulation
    from paddledsv4.numerics.policy import Policy

    policy, costs = Policy.preset(preset), {}
    emulate = needs_emulation(DTYPES[bundle.training.precision])
    for call in record_step(bundle, policy):
        function = getattr(policy.ops(call.path, emulate), call.op)
        cost = costs.setdefault(call.op, OpCost(call.op))
        times = [timed(call, function) for _ in range(repeats)]
        cost.calls += 1
        cost.forward_ms += 1e3 * median(forward for forward, _ in times)
        cost.backward_ms += 1e3 * median(backward for _, backward in times)
    return sorted(costs.values(), key=lambda cost: -cost.total_ms)


def timed(call, function) -> tuple[float, float]:
    """Seconds of one recorded call, forward and backward, without the copying of its arguments."""
    import paddle

    from paddledsv4.observe.ops import as_tuple
    from paddledsv4.observe.replay import backward, copied, copied_values

    args, kwargs = copied(call.args), copied_values(call.kwargs)
    with paddle.set_grad_enabled(call.in_graph):
        start = time.perf_counter()
        outputs = as_tuple(function(*args, **kwargs))
        forward = time.perf_counter() - start
    start = time.perf_counter()
    return forward, time.perf_counter() - start if backward(call, outputs) else 0.0


def times_table(times: dict[str, list[float]]) -> Table:
    table = Table("preset", title="Seconds per step")
    for heading in ("median", "fastest", "ratio"):
        table.add_column(heading, justify="right")
    first = median(next(iter(times.values())))
    for preset, seconds in times.items():
        middle = median(seconds)
        table.add_row(preset, f"{middle:.3f}", f"{min(seconds):.3f}", f"{middle / first:.2f}")
    return table


def costs_table(preset: str, costs: list[OpCost], top: int) -> Table:
    table = Table("op", title=f"{preset}: dearest ops of one microbatch and one update")
    for heading in ("calls", "forward ms", "backward ms", "share"):
        table.add_column(heading, justify="right")
    total = sum(cost.total_ms for cost in costs)
    for cost in costs[:top]:
        figures = f"{cost.forward_ms:.1f}", f"{cost.backward_ms:.1f}", f"{cost.total_ms / total:.0%}"
        table.add_row(cost.op, str(cost.calls), *figures)
    table.add_section()
    forward, backward = sum(cost.forward_ms for cost in costs), sum(cost.backward_ms for cost in costs)
    table.add_row(f"all {len(costs)} ops", "", f"{forward:.1f}", f"{backward:.1f}")
    return table


def main(
    bundle: Annotated[str, typer.Option(help="A bundle's directory, or a shipped one's name.")] = "tiny-fp32",
    presets: Annotated[str, typer.Option(help="Presets to time, commas between them.")] = "torch,megatron,paddle,plain",
    ops: Annotated[str, typer.Option(help="Presets whose ops are timed one by one.")] = "torch,paddle",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each preset.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each recorded call.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Ops to list.")] = 10,
    save: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time a training step under each numerics preset, and its operations one by one."""
    prepare_host(bitwise=True)
    loaded, console = load_bundle(bundle), Console()
    times = step_times(loaded, presets.split(","), steps)
    console.print(times_table(times))
    costs = {preset: op_costs(loaded, preset, repeats) for preset in ops.split(",") if preset}
    for preset, found in costs.items():
        console.print(costs_table(preset, found, top))
    if save is not None:
        figures = {"step_seconds": times, "ops": {p: [asdict(cost) for cost in found] for p, found in costs.items()}}
        save.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    command.command(epilog=EXAMPLES)(main)
    command()
