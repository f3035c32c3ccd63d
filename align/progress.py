"""How a run shows that it lives: a progress bar on a terminal, a short line every ten steps elsewhere."""

from __future__ import annotations

import sys
from typing import Protocol

from typing_extensions import Self

EVERY = 10


class Progress(Protocol):
    """Told after every step."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def step(self, step: int, loss: float, tokens_per_second: float, matched: int, compared: int) -> None:
        """``loss`` is the step's last main loss; ``matched`` of ``compared`` losses so far are equal."""


def progress(steps: int) -> Progress:
    """The kind of progress that fits stderr."""
    return BarProgress(steps) if sys.stderr.isatty() else LineProgress(steps)


class LineProgress:
    """One line on stderr after the first step and every ten."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to tidy up."""

    def step(self, step: int, loss: float, tokens_per_second: float, matched: int, compared: int) -> None:
        """See :class:`Progress`."""
        if step == 1 or step % EVERY == 0 or step == self.steps:
            print(
                f"step {step}/{self.steps} loss {loss:.6f} {tokens_per_second:.0f} tokens/s "
                f"matches {matched}/{compared}",
                file=sys.stderr,
                flush=True,
            )


class BarProgress:
    """A rich bar on stderr."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("steps", total=steps, told="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, matched: int, compared: int) -> None:
        """See :class:`Progress`."""
        self.bar.update(
            self.task,
            completed=step,
            told=f"loss {loss:.6f}  {tokens_per_second:.0f} tokens/s  matches {matched}/{compared}",
        )
