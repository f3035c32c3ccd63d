"""What ``paddledsv4 train`` does once everything is decided; ``paddledsv4 resume`` does it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paddledsv4.commands.running import Run, prepare_paddle, run_training
from paddledsv4.config import Recipe
from paddledsv4.training.data import load_tokens

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy


def pretrain(recipe: Recipe, policy: Callable[[], Policy], resume: str | None, force: bool) -> None:
    """Train on a table of tokens. ``policy`` is called when Paddle may be imported."""
    tokens = load_tokens(recipe.data.tokens, recipe.training.sequence_length, recipe.model.vocab_size)
    prepare_paddle()
    run = Run("train", recipe, policy(), tokens, resume, force)

    def keep(trainer) -> None:
        if recipe.lora:
            from paddledsv4.sft.adapter import save_adapter

            save_adapter(trainer.model, recipe.lora, run.folder / "adapter", trainer.groups, recipe.weights)

    run_training(run, keep)
