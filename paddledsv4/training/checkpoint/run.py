"""A run that may begin with a checkpoint and may leave some."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.config import CheckpointConfig
from paddledsv4.training.checkpoint.directory import Directory, find
from paddledsv4.training.checkpoint.resume import resume
from paddledsv4.training.checkpoint.save import Checkpoints

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


@contextlib.contextmanager
def checkpointing(
    trainer: Trainer, config: CheckpointConfig, source: str | None = None, force: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Iterator[StepResult], list[str]]]:
    """The results of ``trainer``'s steps, saved and resumed as asked, and what a person should know, in sentences.

    Args:
        source: what to resume from: an iter_N, a folder of them, or "auto", the latest of ``config.dir`` if it has one.
        force: also from a checkpoint of another configuration.
        stop: asked before the first step and after each, on all ranks; True ends the run, which saves once more.

    Raises:
        UserError: see :func:`resume` and :class:`Checkpoints`.
    """
    steps, notes, base = trainer.train_config.steps, [], None
    if source == "auto":
        source = config.dir if Directory(Path(config.dir)).latest() is not None else None
        notes += [] if source else [f"no checkpoint in {config.dir} yet: training starts at step 1"]
    if source:
        notes += resume(trainer, Path(source), force)
        directory, step = find(Path(source))
        base = step if config.dir and directory.path.resolve() == Path(config.dir).resolve() else None
        if step >= steps:
            notes.append(f"nothing is left to do: the run ends with step {steps}")
    if config.dir is None:
        yield until(stop, trainer.train(steps)), notes
        return
    with Checkpoints(config, trainer.groups, base) as checkpoints:
        yield checkpoints.saving(trainer, steps, stop), notes


def until(stop: Callable[[], bool], results: Iterator[StepResult]) -> Iterator[StepResult]:
    """The results up to the first after which ``stop`` says so."""
    while not stop() and (result := next(results, None)) is not None:
        yield result
