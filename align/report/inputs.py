"""What a run's directory may hold besides losses.jsonl: results of ``align locate`` and ``align bisect``.

``ulps.json`` (or ``locate.json``)::

    {"rows": [{"layer": "decoder.layers.0", "op": "sinkhorn", "direction": "forward", "max_ulp": 3, "equal": false}]}

``bisect.json``::

    {"switches": [{"op": "sinkhorn", "first_differing_step": 3, "max_loss_difference": 1e-4, "seconds_per_step": 0.1}]}

A bare list does as well as the object around it; keys not named here are ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paddledsv4.errors import UserError


class Distance(BaseModel):
    """How far one op of one layer is from the reference. ``max_ulp`` is None or NaN where no number tells."""

    model_config = ConfigDict(frozen=True)

    layer: str
    op: str
    direction: Literal["forward", "backward", "optimizer"] = "forward"
    max_ulp: float | None = Field(None)
    equal: bool


class Attribution(BaseModel):
    """What flipping one switch alone does; ``first_differing_step`` is None where it changes nothing."""

    model_config = ConfigDict(frozen=True)

    op: str
    first_differing_step: int | None = None
    max_loss_difference: float | None = None
    seconds_per_step: float | None = None


Row = TypeVar("Row", Distance, Attribution)


def read_distances(run: Path) -> list[Distance]:
    """The rows of ulps.json or locate.json, none where neither is there.

    Raises:
        UserError: the file is malformed.
    """
    path = next((run / name for name in ("ulps.json", "locate.json") if (run / name).is_file()), None)
    return _rows(path, "rows", Distance) if path else []


def read_attributions(run: Path) -> dict[str, Attribution]:
    """op -> its row in bisect.json, {} without the file.

    Raises:
        UserError: the file is malformed.
    """
    path = run / "bisect.json"
    return {row.op: row for row in _rows(path, "switches", Attribution)} if path.is_file() else {}


def _rows(path: Path, key: str, kind: type[Row]) -> list[Row]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again or remove it") from None
    rows = said.get(key) if isinstance(said, dict) else said
    if not isinstance(rows, list):
        raise UserError(f"{path}: there must be a list under {key!r}; write it again or remove it")
    try:
        return [kind.model_validate(row) for row in rows]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "a row"
        raise UserError(f"{path}: {where}: {first['msg']}; write it again or remove it") from None
