"""Progress on stderr: a bar on a terminal, a line for every run elsewhere."""

from __future__ import annotations

import sys
from typing import Protocol, Self


class Watch(Protocol):
    """Told what the bisection is doing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def phase(self, name: str, runs: int | None) -> None:
        """A part begins that takes ``runs`` runs; None if nobody knows."""

    def begins(self, what: str) -> None:
        """A run begins; ``what`` says which switches it is about."""

    def ended(self, what: str, outcome: str, remembered: bool) -> None:
        """Its outcome in words, or that of an earlier one."""


def watch() -> Watch:
    """The kind that fits stderr."""
    return BarWatch() if sys.stderr.isatty() else LineWatch()


class LineWatch:
    """One line per phase and per run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to tidy up."""

    def phase(self, name: str, runs: int | None) -> None:
        print(f"{name}{f' ({runs} runs)' if runs else ''}", file=sys.stderr, flush=True)

    def begins(self, what: str) -> None:
        """The line comes at the end."""

    def ended(self, what: str, outcome: str, remembered: bool) -> None:
        print(f"  {what}: {outcome}{' (earlier run)' if remembered else ''}", file=sys.stderr, flush=True)


class BarWatch:
    """A rich bar per phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True))
        self.task = None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def phase(self, name: str, runs: int | None) -> None:
        self.task = self.bar.add_task(name, total=runs, what="")

    def begins(self, what: str) -> None:
        self.bar.update(self.task, what=what)

    def ended(self, what: str, outcome: str, remembered: bool) -> None:
        self.bar.update(self.task, advance=1, what=f"{what}: {outcome}")
