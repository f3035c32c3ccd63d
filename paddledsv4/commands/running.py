"""What the commands that train have in common: from options to a trained model, and what is told on the way."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paddledsv4.config import CheckpointConfig, TrainConfig
from paddledsv4.config.recipe import BaseRecipe
from paddledsv4.info import model_info
from paddledsv4.numerics.rules import Overrides
from paddledsv4.numerics.settings import with_environment
from paddledsv4.training.run_directory import CHECKPOINTS

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.training.data import Source
    from paddledsv4.training.runlog import RunLog
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """A training run, everything decided.

    Attributes:
        command: which one started it.
        recipe: with what the command line and the environment change; ``output`` is the run's own folder.
        policy: the numerics; ``source``: rows of tokens to train on.
        resume, force: see :func:`paddledsv4.training.checkpoint.run.checkpointing`.
        notes: what a person should know before the first step, one sentence each.
        around: each gets the trainer and the results of its steps and passes them on, on every rank: what a command
            does between steps.
    """

    command: str
    recipe: BaseRecipe
    policy: Policy
    source: np.ndarray | Source
    resume: str | None = None
    force: bool = False
    notes: tuple[str, ...] = ()
    around: tuple[Callable[[Trainer, Iterator[StepResult]], Iterator[StepResult]], ...] = ()

    @property
    def folder(self) -> Path:
        """Where the log goes, and what the run leaves."""
        return Path(self.recipe.output)

    @property
    def checkpoints(self) -> CheckpointConfig:
        """In the run's folder, unless the recipe says where."""
        given = self.recipe.checkpoint
        return given if given.dir else given.model_copy(update={"dir": str(self.folder / CHECKPOINTS)})


def run_training(run: Run, keep: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """Connect the ranks, train, log, save checkpoints, and leave a folder that the run can go on from.

    Args:
        keep: gets the trainer, on every rank, when the last step is done, but not when a signal ended the run before.
    """
    from paddledsv4.distributed.connect import connect
    from paddledsv4.distributed.stopping import stop_signals
    from paddledsv4.observe.metrics.run import with_metrics
    from paddledsv4.observe.profile.record import with_profile
    from paddledsv4.observe.run import observing
    from paddledsv4.training.checkpoint.run import checkpointing
    from paddledsv4.training.trainer import Trainer

    recipe = run.recipe
    random.seed(recipe.training.seed)  # Paddle's generator is the trainer's affair, as it belongs to a step
    np.random.seed(recipe.training.seed % 2**32)
    with stop_signals() as stopping, connect(recipe.parallel) as groups:
        trainer = Trainer(
            recipe.model, recipe.training, run.policy, run.source, parallel=recipe.parallel, groups=groups,
            weights=Path(recipe.weights) if recipe.weights else None, lora=recipe.lora,
        )
        asked = partial(stopping.agreed, groups.world)
        with (
            observing(trainer, recipe.observe, run.folder),
            checkpointing(trainer, run.checkpoints, run.resume, run.force, asked) as (results, notes),
        ):
            for wrap in run.around:
                results = wrap(trainer, results)
            results = with_profile(trainer, results, recipe.observe.profile, run.folder)
            results = with_metrics(trainer, results, recipe.observe.metrics, run.folder)
            if groups.world.rank == 0:
                train_and_log(trainer, results, [*run.notes, *notes], run)
            else:
                deque(results, maxlen=0)
        if trainer.optimizer.step_count >= recipe.training.steps:
            keep(trainer)
        elif groups.world.rank == 0:
            _stopped(run, trainer.optimizer.step_count, stopping.name or "a signal to another rank")


def _stopped(run: Run, step: int, by: str) -> None:
    saved = f", saved in {run.checkpoints.dir}" if step else ""
    after = f"after step {step} of {run.recipe.training.steps}" if step else "before the first step"
    text = f"stopped by {by} {after}{saved}; paddledsv4 resume {run.folder} goes on"
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def prepare_paddle() -> None:
    """What must happen before Paddle is imported."""
    from paddledsv4.host import prepare_host

    prepare_host()
    warnings.filterwarnings("ignore", message="No ccache found")  # said on import; nothing is compiled here


def choose_policy(recipe: BaseRecipe, preset: str | None, given: Overrides) -> Policy:
    """The policy of the command line, the recipe and the environment, the first of them that says."""
    from paddledsv4.numerics.policy import Policy

    chosen, overrides = (preset, Overrides()) if preset else recipe.numerics_choice()
    return Policy.from_env(chosen, overrides.then(given))


def choose_training(training: TrainConfig, steps: int | None) -> TrainConfig:
    """A recipe's section with the environment's settings where it is silent, and ``steps`` of the command line.

    Raises:
        UserError: the environment has a value that a setting does not have.
    """
    training = with_environment(training)
    return training.replace(steps=steps) if steps else training


def choose_checkpoints(recipe: BaseRecipe, **options) -> CheckpointConfig:
    """The recipe's checkpoints with what the command line changes.

    Raises:
        UserError: the two do not fit together.
    """
    return recipe.checkpoint.replace(**{name: value for name, value in options.items() if value is not None})


def train_and_log(trainer: Trainer, results: Iterator[StepResult], notes: list[str], run: Run) -> None:
    """Run all steps and tell of them. Rank 0 speaks for all ranks."""
    from paddledsv4.training.run_directory import write_run
    from paddledsv4.training.runlog import RunLog

    recipe, policy, resumed = run.recipe, trainer.policy, trainer.optimizer.step_count or None
    write_run(run.folder, run.command, recipe, policy, resumed)
    header = {"numerics": policy.name, "fingerprint": policy.fingerprint, "policy": policy.describe()}
    sections = {
        "model": recipe.model, "training": trainer.train_config, "parallel": recipe.parallel, "lora": recipe.lora
    }  # fmt: skip
    header |= {name: config.model_dump(mode="json") for name, config in sections.items() if config is not None}
    log = RunLog(run.folder, header, resumed)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    ranks = f", {recipe.parallel.world_size} ranks" if recipe.parallel.world_size > 1 else ""
    size = f"{model_info(recipe.model).parameters:,} parameters, {recipe.training.precision}{ranks}"
    for note in (f"{size}, numerics {policy.name} ({policy.fingerprint})", *policy.remarks, *notes):
        console.print(note)
    try:
        _steps(results, recipe.training.steps, log)
    finally:
        log.close()
        if log.last:
            console.print(f"log {log.path}\ncurves {log.picture}")


def _steps(results: Iterator[StepResult], steps: int, log: RunLog) -> None:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    console, bar = Console(highlight=False, soft_wrap=True, markup=False), Console(stderr=True)
    with Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal) as progress:
        task = progress.add_task("training", total=steps)
        for result in results:
            record = log.write(result)
            progress.update(task, completed=result.step)
            console.print(summary(record))


def summary(record: dict) -> str:
    """One line about a step."""
    norm, speed = f"grad_norm {float(record['grad_norm']):.4f}", f"{record['tokens_per_second']:,} tokens/s"
    return f"step {record['step']}  {_losses(record)}  {norm}  {speed}"


def _losses(record: dict) -> str:
    shown = {"main": "main", "mtp": "mtp", "held-out": "evaluation"}
    return "  ".join(f"{name} {float(record[key]):.4f}" for name, key in shown.items() if record.get(key) is not None)
