"""``paddledsv4 sft``: supervised fine-tuning from a file of conversations to weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from paddledsv4.commands import options
from paddledsv4.commands.observing import observed
from paddledsv4.commands.running import (
    Run,
    choose_checkpoints,
    choose_policy,
    choose_training,
    prepare_paddle,
    run_training,
)
from paddledsv4.errors import UserError
from paddledsv4.numerics.options import LayerOps, Ops
from paddledsv4.numerics.rules import Overrides
from paddledsv4.sft.recipe import SftRecipe

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy

EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 sft --config configs/sft-tiny.yaml

  paddledsv4 sft --config configs/sft-tiny.yaml --data my.jsonl --steps 200 --out runs/mine

  paddledsv4 sft --config configs/sft-tiny.yaml --save runs/sft-tiny/checkpoints --save-interval 20 --resume auto"""


def sft(
    config: Annotated[Path, typer.Option(help="A yaml recipe with model, training and data sections.")],
    data: Annotated[Path | None, typer.Option(help="A file of conversations, instead of the recipe's.")] = None,
    steps: options.Steps = None,
    out: options.Out = None,
    numerics: options.Numerics = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    save: options.Save = None,
    save_interval: options.SaveInterval = None,
    resume: options.Resume = None,
    force: options.Force = False,
    check_finite: options.CheckFinite = None,
    trace_attention: options.TraceAttention = None,
    trace_steps: options.TraceSteps = None,
    metrics: options.Metrics = None,
    metrics_every: options.MetricsEvery = None,
    profile_steps: options.ProfileSteps = None,
    profile_ranks: options.ProfileRanks = None,
) -> None:
    """Fine-tune a model on conversations; leave a log, its curves and the weights in the output folder.

    Every line of the file is one conversation, {"messages": [...]}. They become tokens and loss masks as DeepSeek-V4
    has them, are packed into sequences in which none sees another, and a share is held out to be evaluated. The folder
    [bold]weights[/] can be trained from, or converted with [bold]paddledsv4 convert[/]. Many ranks as with
    [bold]paddledsv4 train[/].
    """
    recipe, given = SftRecipe.from_file(config), Overrides.from_texts(op, layer_op)
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"file": str(data.absolute())})})
    changes = {
        "training": choose_training(recipe.training, steps),
        "checkpoint": choose_checkpoints(recipe, dir=save, save_interval=save_interval),
        "output": str(out or recipe.output),
    }
    recipe = observed(
        recipe.model_copy(update=changes), check_finite, trace_attention, trace_steps,
        metrics, metrics_every, profile_steps, profile_ranks,
    )  # fmt: skip
    fine_tune(recipe, lambda: choose_policy(recipe, numerics, given), resume, force)


def fine_tune(recipe: SftRecipe, policy: Callable[[], Policy], resume: str | None, force: bool) -> None:
    """What the command does once everything is decided. ``policy`` is called when Paddle may be imported."""
    from paddledsv4.sft.load import sources
    from paddledsv4.sft.tokenizer import load_tokenizer

    folder = Path(recipe.output)
    weights = folder / "weights"
    if recipe.export and weights.exists():
        raise UserError(f"{weights} exists, where this run would write its weights; choose another --out or remove it")
    train, evaluation, notes = sources(recipe)

    prepare_paddle()
    from paddledsv4.sft.adapter import save_adapter
    from paddledsv4.sft.merge import save_merged
    from paddledsv4.training.evaluation import evaluated
    from paddledsv4.weights.save import save_model

    def evaluate(trainer, results):
        return evaluated(results, trainer, evaluation, recipe.evaluation_interval)

    def keep(trainer) -> None:
        groups = trainer.groups
        told = Console(highlight=False, quiet=groups.world.rank > 0)
        if recipe.lora:
            save_adapter(trainer.model, recipe.lora, folder / "adapter", groups, recipe.weights)
            told.print(f"adapter {folder / 'adapter'}", soft_wrap=True)
            if recipe.export and groups.world.size == 1:
                save_merged(trainer.model, recipe.lora, weights)
                told.print(f"weights {weights}, the adapter added", soft_wrap=True)
        elif recipe.export:
            size = save_model(trainer.model, weights, groups, (load_tokenizer(recipe.data.tokenizer).path,))
            told.print(f"weights {weights} ({size / 1e6:,.1f} MB)", soft_wrap=True)

    run_training(Run("sft", recipe, policy(), train, resume, force, tuple(notes), (evaluate,)), keep)
