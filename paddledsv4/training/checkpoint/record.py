"""``checkpoint.json``, written when every rank is done: what was saved, and the MD5 of every file.

What is read is held against a form before it is used: a digest shows that a file is as it was written, not that it was
written by us.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint.directory import RECORD

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Word, Place = Annotated[int, Field(ge=0, lt=2**32)], Annotated[int, Field(ge=0, le=624)]
FileName = Annotated[str, Field(pattern=r"^\w[\w.]*$")]  # in the same folder


class Tensor(TypedDict):
    """A piece in a rank's file, see :class:`paddledsv4.training.checkpoint.shard.Piece`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    dtype: Literal["F64", "F32", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: list[Count]
    global_shape: list[Count]
    offset: list[Count]
    crc32: Count


class Random(TypedDict):
    """See :func:`paddledsv4.training.checkpoint.state.random_state`."""

    python: tuple[Literal[3], Annotated[list[Word], Field(min_length=625, max_length=625)], float | None]
    numpy: tuple[
        Literal["MT19937"], Annotated[list[Word], Field(min_length=624, max_length=624)], Place, Literal[0, 1], float
    ]


class Rank(TypedDict):
    """What one rank wrote beside its tensors."""

    random: Random
    file: FileName
    bytes: Count
    md5: str
    tensors: list[Tensor]


class Layout(TypedDict):
    """See :func:`paddledsv4.training.checkpoint.identity.layout`."""

    data: int
    expert: int
    tensor: int
    context: int
    pipeline: int
    expert_tensor_size: int
    sequence_parallel: bool
    accumulation: int


class Record(TypedDict):
    """``checkpoint.json``."""

    format: int
    step: Annotated[int, Field(ge=1)]
    ranks: Annotated[int, Field(ge=1)]
    rows_seen: Count
    layout: Layout
    fingerprint: str
    run: dict[str, Any]
    files: dict[FileName, str]


RECORD_FORM, RANK_FORM = TypeAdapter(Record), TypeAdapter(Rank)


def digest(data: bytes) -> str:
    """MD5 as 32 hexadecimal digits."""
    return hashlib.md5(data).hexdigest()


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with an MD5 of themselves."""
    return dict(values) | {"md5": digest(json.dumps(values, sort_keys=True).encode())}


def rank_name(rank: int) -> str:
    """The name of a rank's two files, without the suffix."""
    return f"rank_{rank:05d}"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a complete checkpoint.

    Raises:
        UserError: damaged, or of another format.
    """
    return read_sealed(folder / RECORD, FORMAT, RECORD_FORM)


def read_sealed(path: Path, format: int, form: TypeAdapter) -> dict[str, Any]:
    """The values that :func:`seal` got, from a file of format ``format``.

    Raises:
        UserError: damaged, or of another format or form.
    """
    values = _read_json(path)
    said = values.pop("md5", None)
    if seal(values)["md5"] != said:
        raise UserError(f"{path}: is damaged: its MD5 is not the recorded one")
    if values.get("format") != format:
        raise UserError(f"{path}: has format {values.get('format')}; this version reads format {format}")
    return _of_form(values, form, path)


def read_rank(folder: Path, rank: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """What one rank wrote beside its tensors.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / f"{rank_name(rank)}.json"
    values = _read_json(path)
    if digest(path.read_bytes()) != record["files"].get(path.name):
        raise UserError(f"{path}: is damaged: its MD5 is not the recorded one")
    return _of_form(values, RANK_FORM, path)


def _of_form(values: dict[str, Any], form: TypeAdapter, path: Path) -> dict[str, Any]:
    try:
        form.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: is damaged: {place}: {' '.join(first['msg'].split())}") from None
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is damaged: it is not a mapping")
    return values
