"""What watches a run, as the command line asks for it: guard, traces, metrics, profiles."""

from __future__ import annotations

from typing import TypeVar

from paddledsv4.config.metrics import Format
from paddledsv4.config.recipe import BaseRecipe
from paddledsv4.errors import UserError
from paddledsv4.observe.metrics.formats import check_installed

R = TypeVar("R", bound=BaseRecipe)


def observed(
    recipe: R, check_finite: str | None, trace_attention: str | None, trace_steps: str | None,
    metrics: str | None, every: int | None, steps: str | None, ranks: str | None,
) -> R:
    """A copy with --check-finite, --trace-attention, --trace-steps, --metrics, --metrics-every, --profile-steps and
    --profile-ranks, where they are given.

    Raises:
        UserError: they say nothing legal, a package is missing that they need, or the run has no such step or rank.
    """
    observe = recipe.observe.changed(check_finite, trace_attention, trace_steps)
    wanted, profile = observe.metrics, observe.profile
    if metrics is not None:
        wanted = wanted.replace(formats=tuple(metrics.replace(" ", "").split(",")))
    if every is not None:
        wanted = wanted.replace(every=every)
    if every is not None and not wanted.formats:
        raise UserError(f"--metrics-every goes with --metrics, such as {','.join(Format.__args__)}")
    if steps is not None:
        profile = profile.replace(steps=steps)
    if ranks is not None:
        if profile.steps is None:
            raise UserError("--profile-ranks goes with --profile-steps, such as 5:8")
        if not all(rank.isascii() and rank.isdecimal() for rank in ranks.split(",")):
            raise UserError(f"--profile-ranks {ranks}: must be ranks with commas between them, such as 0,3")
        profile = profile.replace(ranks=tuple(map(int, ranks.split(","))))
    check_installed(wanted.formats)
    profile.check(recipe.parallel.world_size, recipe.training.steps)
    return recipe.model_copy(update={"observe": observe.replace(metrics=wanted, profile=profile)})
