"""What the commands that train have in common: checkpoint options, a progress bar, the log, the last words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paddledsv4.config import CheckpointConfig, TrainConfig
from paddledsv4.config.recipe import BaseRecipe
from paddledsv4.errors import UserError
from paddledsv4.info import model_info
from paddledsv4.numerics.rules import Overrides
from paddledsv4.numerics.settings import with_environment

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.training.runlog import RunLog
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


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


def choose_checkpoints(recipe: BaseRecipe, resume: str | None, **options) -> CheckpointConfig:
    """The recipe's checkpoints with what the command line changes.

    Raises:
        UserError: the two do not fit together.
    """
    saving = recipe.checkpoint.replace(**{name: value for name, value in options.items() if value is not None})
    if resume == "auto" and saving.dir is None:
        raise UserError("--resume auto needs a folder to look in: --save, or checkpoint.dir in the recipe")
    return saving


def train_and_log(
    trainer: Trainer, results: Iterator[StepResult], notes: list[str], recipe: BaseRecipe, folder: Path
) -> None:
    """Run all steps and tell of them. Rank 0 speaks for all ranks."""
    from paddledsv4.training.runlog import RunLog

    policy, training = trainer.policy, trainer.train_config
    header = {"numerics": policy.name, "fingerprint": policy.fingerprint, "policy": policy.describe()}
    sections = {"model": recipe.model, "training": training, "parallel": recipe.parallel, "lora": recipe.lora}
    header |= {name: config.model_dump(mode="json") for name, config in sections.items() if config is not None}
    log = RunLog(folder, header, trainer.optimizer.step_count or None)
    console = Console()
    ranks = f", {recipe.parallel.world_size} ranks" if recipe.parallel.world_size > 1 else ""
    size = f"{model_info(recipe.model).parameters:,} parameters, {training.precision}{ranks}"
    console.print(f"{size}, numerics {policy.name} ({policy.fingerprint})", highlight=False)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    try:
        _steps(results, trainer.train_config.steps, log)
    except KeyboardInterrupt:
        console.print(f"stopped by Ctrl-C after step {trainer.optimizer.step_count}")
        raise typer.Exit(130) from None
    finally:
        log.close()
        if log.records:
            _last_step(log, console)


def _steps(results: Iterator[StepResult], steps: int, log: RunLog) -> None:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps, loss="")
        for result in results:
            record = log.write(result)
            progress.update(task, completed=result.step, loss=_losses(record))
            if not (math.isfinite(float(record["main"])) and math.isfinite(float(record["grad_norm"]))):
                numbers = f"{_losses(record)}  grad_norm {record['grad_norm']}"
                raise UserError(f"step {result.step}: {numbers}: not finite, training stopped")


def _losses(record: dict) -> str:
    shown = {"main": "main", "mtp": "mtp", "held-out": "evaluation"}
    return "  ".join(f"{name} {float(record[key]):.4f}" for name, key in shown.items() if record.get(key) is not None)


def _last_step(log: RunLog, console: Console) -> None:
    last = log.records[-1]
    speed = f"grad_norm {float(last['grad_norm']):.4f}  {last['tokens_per_second']:,} tokens/s"
    console.print(f"step {last['step']}  {_losses(last)}  {speed}", highlight=False)
    console.print(f"log {log.path}\ncurves {log.picture}", highlight=False, soft_wrap=True, markup=False)
