"""The folder of a run, from which it can go on with nothing else::

    run.json       what was asked for: the whole recipe, numerics, code, environment, command lines
    train.jsonl    a header, then a line per step (paddledsv4.training.runlog)
    loss.png       its curves
    checkpoints/   unless the recipe has them elsewhere (paddledsv4.training.checkpoint)
    adapter/, weights/   what a finished run leaves, if it leaves that
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint.directory import write_json
from paddledsv4.training.checkpoint.record import read_sealed, seal
from paddledsv4.training.provenance import provenance

if TYPE_CHECKING:
    from paddledsv4.config.recipe import BaseRecipe
    from paddledsv4.numerics.policy import Policy

RUN, CHECKPOINTS, FORMAT = "run.json", "checkpoints", 1


class Numerics(TypedDict):
    """See :class:`paddledsv4.numerics.policy.Policy`."""

    preset: str
    fingerprint: str
    policy: dict[str, str]


class Code(TypedDict):
    """See :func:`paddledsv4.training.provenance.provenance`."""

    version: str | None
    sources: str
    revision: NotRequired[str]
    changed: NotRequired[list[str]]


class RunRecord(TypedDict):
    """``run.json``."""

    format: int
    command: str
    folder: str
    recipe: dict[str, Any]
    numerics: Numerics
    code: Code
    versions: dict[str, str | None]
    variables: dict[str, str]
    machine: dict[str, Any]
    starts: list[dict[str, Any]]


RUN_FORM = TypeAdapter(RunRecord)


def write_run(folder: Path, command: str, recipe: BaseRecipe, policy: Policy, resumed: int | None) -> None:
    """Say in ``run.json`` what this run is. ``resumed``: the step it goes on after; earlier starts stay listed.

    Raises:
        UserError: it cannot be written.
    """
    file = folder / RUN
    start = {"argv": sys.argv, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "after": resumed or 0}
    origin = provenance()
    start |= {"host": origin["machine"]["host"], "revision": origin["code"].get("revision")}
    earlier = read_run(folder)["starts"] if resumed and file.exists() else []
    asked = recipe.model_dump(mode="json", by_alias=True)
    if recipe.checkpoint.dir:
        asked["checkpoint"]["dir"] = str(Path(recipe.checkpoint.dir).resolve())
    values = {
        "format": FORMAT, "command": command, "folder": str(folder.resolve()),
        "recipe": asked,
        "numerics": {"preset": policy.name, "fingerprint": policy.fingerprint, "policy": policy.describe()},
        **origin, "starts": [*earlier, start],
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, seal(values), indent=1)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def read_run(folder: Path) -> dict[str, Any]:
    """What :func:`write_run` wrote.

    Raises:
        UserError: it is no folder of a run, or ``run.json`` is damaged, incomplete or of another format.
    """
    if not (folder / RUN).is_file():
        raise UserError(f"{folder}: is not the folder of a run: it has no {RUN}")
    return read_sealed(folder / RUN, FORMAT, RUN_FORM)
