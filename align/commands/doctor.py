"""``align doctor``: before a run, can it match bit for bit here?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from align.commands.people import for_people

EXAMPLES = "Examples:  [bold]align doctor tiny-fp32[/]   [bold]align doctor ./my-bundle --json[/]"


def doctor(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a bitwise match with a bundle can be expected on this machine, and what to do if not.

    Compares environment, versions, threads and processor with what the bundle recorded, and runs small kernels (matrix
    products, softmax, sums, ...) to compare their results with the bundle's fingerprint. The environment is the one
    that align run would have: pins that are not set are set, and those that are set stay.

    Exit code 0: a match can be expected. 1: it cannot; the commands that help are printed. 2: bad input.
    """
    with for_people():
        from align.bundle import load_bundle
        from align.doctor.checks import diagnose
        from align.doctor.here import look

        found = diagnose(load_bundle(bundle).source, look(), bundle)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        _show(found)
    raise typer.Exit(0 if found.ok else 1)


def _show(found) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    signs = {"equal": ("=", "green"), "different": ("≠", "bold red"), "unknown": ("·", "dim")}
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table("", "what", "here", "reference")
    for check in found.checks:
        table.add_row(Text(*signs[check.state]), *map(Text, (check.name, check.here, check.reference)))
    console.print(table)
    console.print(Text(found.verdict), soft_wrap=True)
    for fix in found.fixes:
        console.print(Text(f"  {fix}"), soft_wrap=True)
