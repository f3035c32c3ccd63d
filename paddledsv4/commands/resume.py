"""``paddledsv4 resume``: a run goes on from its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from paddledsv4.commands.options import Steps
from paddledsv4.commands.pretraining import pretrain
from paddledsv4.commands.sft import fine_tune
from paddledsv4.config import Recipe
from paddledsv4.config.recipe import BaseRecipe
from paddledsv4.errors import UserError
from paddledsv4.numerics.rules import LayerRule, Overrides
from paddledsv4.sft.recipe import SftRecipe
from paddledsv4.training.provenance import other_bits, provenance, restore_variables
from paddledsv4.training.run_directory import RUN, read_run

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy

EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 resume runs/tiny

  paddledsv4 resume runs/tiny --steps 200"""

COMMANDS = {"train": (Recipe, pretrain), "sft": (SftRecipe, fine_tune)}


def resume(
    folder: Annotated[Path, typer.Argument(help="The folder that a run has left.", metavar="DIR")],
    steps: Steps = None,
    force: Annotated[bool, typer.Option(help="Also with other code, libraries or settings of kernels.")] = False,
) -> None:
    """Go on with a run that was killed, stopped or finished, from its last checkpoint or from the beginning.

    The folder says all the rest. Many ranks are started as before, each with this command. What would change bits is
    refused: other code of paddledsv4, other versions of what computes, other variables that choose kernels.
    """
    said = read_run(folder)
    if said["command"] not in COMMANDS:
        raise UserError(f"{folder / RUN}: command = {said['command']!r}: must be one of: {', '.join(COMMANDS)}")
    kind, go_on = COMMANDS[said["command"]]
    recipe = _recipe(kind, said, folder)
    if steps:
        recipe = recipe.model_copy(update={"training": recipe.training.replace(steps=steps)})
    restore_variables(said["variables"])
    with_torch = recipe.parallel.world_size > 1 or "torch" in said["numerics"]["policy"].values()
    if reasons := list(other_bits(said, provenance(), with_torch)):
        if not force:
            raise UserError(f"{folder} would not go on bit for bit: {'; '.join(reasons)}; --force goes on all the same")
        Console(stderr=True).print(f"forced, although {'; '.join(reasons)}", highlight=False, soft_wrap=True)
    go_on(recipe, lambda: _policy(said["numerics"], folder), "auto", force)


def _recipe(kind: type[BaseRecipe], said: Mapping[str, Any], folder: Path) -> BaseRecipe:
    """The recipe of the run, whose folder may have been moved since."""
    recipe = kind.from_dict(said["recipe"], where=str(folder / RUN))
    changes: dict[str, Any] = {"output": str(folder)}
    given, before = recipe.checkpoint.dir, Path(said["folder"])
    if given and Path(given).is_relative_to(before):
        moved = folder / Path(given).relative_to(before)
        changes["checkpoint"] = recipe.checkpoint.replace(dir=str(moved))
    return recipe.model_copy(update=changes)


def _policy(said: Mapping[str, Any], folder: Path) -> Policy:
    """The policy of the run, whatever the environment says now."""
    from paddledsv4.numerics.policy import Policy

    rules = [(*name.rpartition(":"), variant) for name, variant in said["policy"].items()]
    given = Overrides(
        {op: variant for glob, _, op, variant in rules if not glob},
        tuple(LayerRule(glob, op, variant) for glob, _, op, variant in rules if glob),
    )
    policy = Policy.preset(said["preset"], given.ops, given.layers)
    if policy.fingerprint != said["fingerprint"]:
        raise UserError(
            f"{folder / RUN}: its numerics have fingerprint {said['fingerprint']}, here they get {policy.fingerprint}: "
            "the ops are others in this version"
        )
    return policy
