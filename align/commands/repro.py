"""``align repro``: one op that gave a number that is not finite, again and alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from align.commands.people import for_people

EXAMPLES = (
    "Examples:  [bold]align repro runs/tiny/nonfinite-step7-rank0.safetensors[/]   "
    "[bold]align repro FILE --numerics torch[/]   [bold]align repro FILE --variant plain --variant megatron[/]"
)


def repro(
    file: Annotated[Path, typer.Argument(help="What a run with --check-finite full left.")],
    numerics: Annotated[str | None, typer.Option(help="Against the variant of this preset; all by default.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Against this variant of the op; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run one op alone on its recorded inputs, forward and backward, and say what is not finite.

    The variant that the run used comes first; the others are measured against it. A NaN equals nothing.

    Exit code 0: every number is finite. 1: some are not. 2: bad input.
    """
    with for_people():
        from paddledsv4.host import prepare_host

        prepare_host(bitwise=True)
        from align.repro import as_dict, as_table, rerun
        from paddledsv4.observe.reproduction import read

        recorded = read(file)
        found = rerun(recorded, numerics, variant or ())
    if as_json:
        print(json.dumps(as_dict(recorded, found), indent=1))
    else:
        origin = recorded.origin
        used = f"variant {origin.variant}" if origin.variant else "a function that is in no table"
        print(f"{origin.op} of {origin.path or 'model'}, step {origin.step}, microbatch {origin.microbatch}, "
              f"rank {origin.rank}, {origin.precision}, {used}\nfound: {origin.found}")
        Console(width=None if sys.stdout.isatty() else 130).print(as_table(found))
    raise typer.Exit(1 if any(g.wrong for g in found) else 0)
