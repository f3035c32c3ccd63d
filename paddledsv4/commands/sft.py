"""``paddledsv4 sft``: supervised fine-tuning from a file of conversations to weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from paddledsv4.commands.observing import metered
from paddledsv4.commands.options import (
    CheckFinite,
    Force,
    Metrics,
    MetricsEvery,
    Numerics,
    Out,
    ProfileRanks,
    ProfileSteps,
    Resume,
    Save,
    SaveInterval,
    Steps,
    TraceAttention,
    TraceSteps,
)
from paddledsv4.commands.running import Run, choose_checkpoints, choose_policy, prepare_paddle, run_training
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
    steps: Steps = None,
    out: Out = None,
    numerics: Numerics = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    save: Save = None,
    save_interval: SaveInterval = None,
    resume: Resume = None,
    force: Force = False,
    check_finite: CheckFinite = None,
    trace_attention: TraceAttention = None,
    trace_steps: TraceSteps = None,
    metrics: Metrics = None,
    metrics_every: MetricsEvery = None,
    profile_steps: ProfileSteps = None,
    profile_ranks: ProfileRanks = None,
) -> None:
    """Fine-tune a model on conversations; leave a log, its curves and the weights in the output folder.

    Every line of the file is one conversation, {"messages": [...]}. They become tokens and loss masks as DeepSeek-V4
    has them, are packed into sequences in which none sees another, and a share is held out to be evaluated. The folder
    [bold]weights[/] can be trained from, or converted with [bold]paddledsv4 convert[/]. Many ranks as with
    [bold]paddledsv4 train[/].
    """
    recipe, given = SftRecipe.from_file(config), Overrides.from_texts(op, layer_op)
    recipe = recipe.observed(check_finite, trace_attention, trace_steps)
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"file": str(data.absolute())})})
    if steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.replace(steps=steps)})
    changes = {
        "checkpoint": choose_checkpoints(recipe, dir=save, save_interval=save_interval),
        "output": str(out or recipe.output),
    }
    recipe = metered(recipe.model_copy(update=changes), metrics, metrics_every, profile_steps, profile_ranks)
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
