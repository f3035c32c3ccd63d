"""``checkpoint.json``, written when every rank is done: what was saved, and the MD5 of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint.directory import RECORD

FORMAT = 1


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
    return read_sealed(folder / RECORD, FORMAT)


def read_sealed(path: Path, format: int) -> dict[str, Any]:
    """The values that :func:`seal` got, from a file of format ``format``.

    Raises:
        UserError: damaged, or of another format.
    """
    values = _read_json(path)
    said = values.pop("md5", None)
    if seal(values)["md5"] != said:
        raise UserError(f"{path}: is damaged: its MD5 is not the recorded one")
    if values.get("format") != format:
        raise UserError(f"{path}: has format {values.get('format')}; this version reads format {format}")
    return values


def read_rank(folder: Path, rank: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """What one rank wrote beside its tensors.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / f"{rank_name(rank)}.json"
    values = _read_json(path)
    if digest(path.read_bytes()) != record["files"][path.name]:
        raise UserError(f"{path}: is damaged: its MD5 is not the recorded one")
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
