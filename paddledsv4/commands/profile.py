"""``paddledsv4 profile``: the time of each op in a trace."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 train --config configs/tiny.yaml --steps 8 --profile-steps 5:8

  paddledsv4 profile runs/tiny/profile/rank0.json"""


def profile(
    file: Annotated[Path, typer.Argument(help="A trace that --profile-steps left.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how long each op took, forward and backward, in the steps that were profiled.

    An op's time is its own: what ran inside it and is an op as well counts there. [bold]between ops[/] is the rest of
    the steps. The trace itself opens in chrome://tracing and Perfetto.
    """
    from paddledsv4.commands.running import prepare_paddle

    prepare_paddle()
    from paddledsv4.observe.profile.table import as_table, op_times
    from paddledsv4.observe.profile.trace import read_trace

    times = op_times(read_trace(file))
    if as_json:
        ops = [asdict(op) for op in times.ops]
        print(json.dumps({"steps": times.steps, "milliseconds": times.milliseconds, "ops": ops}, indent=2))
    else:
        Console().print(as_table(times, file.stem))
