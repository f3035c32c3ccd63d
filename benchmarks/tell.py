"""How the small benchmarks end: a table for people, and the figures for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console, RenderableType


def tell(table: RenderableType, figures: list[dict], out: Path | None) -> None:
    """Print the table; write the figures to ``out`` where it is given."""
    Console().print(table)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def run(main: Callable[..., None], doc: str, examples: str) -> None:
    """Call ``main`` with the words of the command line; ``doc`` is its help."""
    main.__doc__ = doc
    app = typer.Typer(add_completion=False)
    app.command(epilog=examples)(main)
    app()
