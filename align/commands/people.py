"""How every command of align ends when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from paddledsv4.errors import UserError


@contextmanager
def for_people() -> Iterator[None]:
    """Mistakes of the user end in one line and exit 2, Ctrl-C likewise in exit 130; bugs keep their trace."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
