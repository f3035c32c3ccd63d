"""``align bisect``: which numeric switches a divergence comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from align.commands.people import for_people
from paddledsv4.numerics.options import LayerOps, Ops

STEPS = 3

EXAMPLES = (
    "Examples:  [bold]align bisect tiny-fp32[/]   [bold]align bisect tiny-fp32 --from megatron --budget 10m[/]   "
    "[bold]align bisect tiny-fp32 --from torch --op sinkhorn=paddle,linear=megatron --layers[/]"
)


def bisect(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    before: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NUMERICS",
            help="What differs from the bundle: a preset, or PRESET,OP=VARIANT,...; PADDLEDSV4_NUMERICS, or paddle, by "
            "default. PADDLEDSV4_ variables of single ops count, and --op and --layer-op.",
        ),
    ] = None,
    after: Annotated[
        str, typer.Option("--to", metavar="NUMERICS", help="What should equal it; the environment does not count.")
    ] = "torch",
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Steps of every run; {STEPS} by default, or what the bundle has.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N|TIME", help="At most N new runs, or none begun after TIME, such as 10m.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for bisect.json and the finished runs; that of align run by default.")
    ] = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also flip each culprit in one layer at a time.")] = False,
    flips: Annotated[
        bool,
        typer.Option(help="--no-flips finds only the smallest set: fewer runs where few of many switches matter."),
    ] = True,
    losses_only: Annotated[
        bool,
        typer.Option(
            "--losses-only",
            help="Let the smallest set give equal losses, whatever the weights; a set may do so by chance.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which numeric switches make a run differ from a bundle's losses.

    A switch is an op whose variants differ between --from and --to. First each one is flipped alone: all as in --to
    but this one. Then comes the smallest set of switches that, taken from --to, gives every recorded loss bit by bit,
    and after every step the weights that --to gives. Every finished run is kept: after Ctrl-C or a spent budget the
    same command goes on.

    Exit code 0: full equality is reached, and the switches are known. 1: switches do not explain it, or the budget is
    spent. 2: bad input.
    """
    with for_people():
        result = _bisect(bundle, before, after, steps, budget, out, (op, layer_op), flips, layers, not losses_only)
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
    else:
        _show(result, bundle)
    raise typer.Exit(result.exit_code)


def _bisect(name, before, after, steps, budget_text, out, overrides, *plan):
    from align.bisect.budget import Budget
    from align.bundle import load_bundle
    from align.files import write_whole
    from align.run import check_supported, run_directory
    from paddledsv4.host import prepare_host
    from paddledsv4.numerics.rules import Overrides

    budget, loaded = Budget.parse(budget_text), load_bundle(name)
    precision = check_supported(loaded, steps)
    prepare_host(bitwise=True)
    from align.bisect.attribution import Plan
    from align.bisect.attribution import bisect as attribute
    from align.bisect.switches import Switches, parse_policy
    from align.bisect.trial import Trial
    from align.bisect.watch import watch

    candidate = parse_policy(before or "", environment=True, overrides=Overrides.from_texts(*overrides))
    switches = Switches.between(candidate, parse_policy(after), precision)
    trial = Trial(loaded, steps or min(STEPS, loaded.training.steps), precision)
    directory = out or run_directory(loaded, candidate, precision)
    try:
        result = attribute(trial, switches, directory, budget, watch(), Plan(*plan))
    except KeyboardInterrupt:
        print(f"interrupted: the finished runs are kept in {directory}; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    path = directory / "bisect.json"
    write_whole(path, json.dumps(result.as_dict(), indent=1) + "\n")
    print(f"result: {path}", file=sys.stderr)
    return result


def _show(result, bundle: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from align.bisect.tables import tables

    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(result):
        console.print(table)
    for line in result.explain(bundle):
        console.print(Text(line), soft_wrap=True)
