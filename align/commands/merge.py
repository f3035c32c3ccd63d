"""``align merge``: the ranks of a captured Megatron job, put together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from align.commands.people import for_people

EXAMPLES = "Examples:  [bold]align merge out/bundle/rank* --out bundles/mine[/]"


def merge(
    ranks: Annotated[list[Path], typer.Argument(help="The folders that the ranks wrote, in any order.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; must not be there yet.")],
) -> None:
    """Merge what the ranks of a Megatron job captured into one bundle.

    Expert, data and tensor parallel ranks: experts get their global numbers, split tensors are joined, and every other
    tensor must be equal on all ranks, or the first that is not is named.

    Exit code 0: the bundle is written. 2: bad input, and nothing is written.
    """
    with for_people():
        from align.capture.merge import merge as merged

        path = merged(ranks, out)
        print(f"bundle: {path}", file=sys.stderr)
