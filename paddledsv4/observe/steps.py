"""Watch the steps of a trainer: ``trainer.observers`` holds objects that are told when steps begin and end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


class StepObserver:
    """Told of every step on every rank. An exception that one raises ends the run before the step can be saved."""

    def begin_step(self, step: int) -> None:
        """Step number ``step`` (from 1) begins."""

    def begin_microbatch(self, index: int) -> None:
        """Its microbatch ``index`` (from 0) begins."""

    def end_step(self, result: StepResult) -> None:
        """It is done, the optimizer's update included; nobody else has seen the result yet."""


@contextlib.contextmanager
def attached(trainer: Trainer, observer: StepObserver) -> Iterator[None]:
    """``observer`` is told of the steps in this block."""
    trainer.observers.append(observer)
    try:
        yield
    finally:
        trainer.observers.remove(observer)
