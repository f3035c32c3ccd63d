"""``paddledsv4 sft``: supervised fine-tuning from a file of conversations to weights."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paddledsv4.commands.options import Force, Numerics, Out, Resume, Save, SaveInterval, Steps
from paddledsv4.commands.running import (
    choose_checkpoints,
    choose_policy,
    choose_training,
    prepare_paddle,
    train_and_log,
)
from paddledsv4.errors import UserError
from paddledsv4.numerics.options import LayerOps, Ops
from paddledsv4.numerics.rules import Overrides

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
) -> None:
    """Fine-tune a model on conversations; leave a log, its curves and the weights in the output folder.

    Every line of the file is one conversation, {"messages": [...]}. They become tokens and loss masks as DeepSeek-V4
    has them, are packed into sequences in which none sees another, and a share is held out to be evaluated. The folder
    [bold]weights[/] can be trained from, or converted with [bold]paddledsv4 convert[/]. Many ranks as with
    [bold]paddledsv4 train[/].
    """
    from paddledsv4.sft.load import sources
    from paddledsv4.sft.recipe import SftRecipe
    from paddledsv4.sft.tokenizer import load_tokenizer

    recipe, given = SftRecipe.from_file(config), Overrides.from_texts(op, layer_op)
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"file": str(data)})})
    recipe = recipe.model_copy(update={"training": choose_training(recipe.training, steps)})
    saving = choose_checkpoints(recipe, resume, dir=save, save_interval=save_interval)
    folder = out or Path(recipe.output)
    weights = folder / "weights"
    if recipe.export and weights.exists():
        raise UserError(f"{weights} exists, where this run would write its weights; choose another --out or remove it")
    train, evaluation, notes = sources(recipe)

    prepare_paddle()
    from paddledsv4.distributed.connect import connect
    from paddledsv4.sft.adapter import save_adapter
    from paddledsv4.sft.merge import save_merged
    from paddledsv4.training.checkpoint.run import checkpointing
    from paddledsv4.training.evaluation import evaluated
    from paddledsv4.training.trainer import Trainer
    from paddledsv4.weights.save import save_model

    policy = choose_policy(recipe, numerics, given)
    with connect(recipe.parallel) as groups:
        trainer = Trainer(
            recipe.model, recipe.training, policy, train, parallel=recipe.parallel, groups=groups,
            weights=Path(recipe.weights) if recipe.weights else None, lora=recipe.lora,
        )
        with checkpointing(trainer, saving, resume, force) as (results, more):
            results = evaluated(results, trainer, evaluation, recipe.evaluation_interval)
            if groups.world.rank == 0:
                train_and_log(trainer, results, [*notes, *more], recipe, folder)
            else:
                deque(results, maxlen=0)
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
