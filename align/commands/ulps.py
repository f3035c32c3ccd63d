"""``align ulps``: how far two presets' ops are apart on the numbers of a real step."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from align.commands.people import for_people
from paddledsv4.errors import UserError

EXAMPLES = (
    "Examples:  [bold]align ulps tiny-fp32[/]   [bold]align ulps tiny-fp32 --numerics paddle --against plain[/]"
)


def ulps(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    numerics: Annotated[str, typer.Option(help="Preset that trains, and whose ops are measured.")] = "megatron",
    against: Annotated[str, typer.Option(help="Preset to measure the distance from.")] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Replace the measurement that paddledsv4 ships, numerics/ulps.json.")
    ] = False,
) -> None:
    """Measure how far two presets' ops are apart, in units in the last place, on the numbers of a real step.

    One microbatch is trained with the first preset; every call of an op is replayed with both, forward and backward.
    """
    with for_people():
        from align.bundle import load_bundle
        from paddledsv4.host import prepare_host

        loaded = load_bundle(bundle)
        prepare_host(bitwise=True)
        from align.ulps import as_table, measure, record_step, report, save
        from paddledsv4.model import DTYPES
        from paddledsv4.numerics.policy import Policy

        ours, theirs = Policy.from_env(numerics), Policy.from_env(against)
        if write and (numerics, against) != ("megatron", "torch"):
            raise UserError("--write replaces the distance of megatron from torch: leave out --numerics and --against")
        distances = measure(record_step(loaded, ours), ours, theirs, DTYPES[loaded.training.precision])
        measurement = report(distances, loaded)
        if write:
            save(measurement)
        if as_json:
            print(json.dumps(measurement, indent=1))
        else:
            Console().print(as_table(distances, f"{numerics} against {against}, {loaded.name} step 1, in ULPs"))
