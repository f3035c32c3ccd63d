"""Writing a checkpoint: shard by shard into a hidden folder, which takes the final name when everything is there."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.weights import storage
from paddledsv4.weights.files import INDEX

PLAN = "plan.json"  # in the hidden folder: what is being written, so that only the same command goes on with it


@dataclass(frozen=True)
class Entry:
    """A tensor to write; ``pieces`` gives its bytes in order, as arrays."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes."""
        return storage.size(self.dtype, self.shape)


def shards(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """File name -> its tensors: in order, so many that a file has at most ``limit`` bytes, one at least."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.size > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.size
    return {f"model-{i:05}-of-{len(files):05}.safetensors": group for i, group in enumerate(files, 1)}


def arrange(entries: Sequence[Entry]) -> list[Entry]:
    """The order within a file: wide dtypes first, so that every tensor starts at a multiple of its element's size."""
    return sorted(entries, key=lambda entry: -storage.NUMPY[entry.dtype].itemsize)


def header(entries: Sequence[Entry]) -> bytes:
    """What stands before the data of a safetensors file with these tensors."""
    described, offset = {"__metadata__": {"format": "np"}}, 0
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size],
        }  # fmt: skip
        offset += entry.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Folder:
    """A checkpoint folder in the making.

    Finished files of an earlier, interrupted call with the same ``plan`` are kept; those of another plan are not.

    Raises:
        UserError: ``target`` exists, or cannot be written to.
    """

    def __init__(self, target: Path, plan: dict):
        self.target = target
        self.hidden = target.with_name(f".{target.name}.partial")
        try:
            if target.exists() or target.is_symlink():
                raise UserError(f"{target} exists; choose another folder or remove it")
            if self._plan() != plan:
                self.discard()
                self.hidden.mkdir(parents=True)
                self.write_text(PLAN, json.dumps(plan))
        except OSError as error:
            raise self._cannot(error) from None

    def _plan(self) -> dict | None:
        try:
            return json.loads((self.hidden / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def has(self, name: str, entries: Sequence[Entry]) -> bool:
        """Whether a file is there already, whole: files get their names when they are."""
        path, entries = self.hidden / name, arrange(entries)
        return path.is_file() and path.stat().st_size == len(header(entries)) + sum(entry.size for entry in entries)

    def check_space(self, size: int) -> None:
        """Raise :class:`UserError` if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.hidden).free
        if free < size:
            raise UserError(f"{self.target}: needs {size:,} bytes, the disk has {free:,} left; choose another disk")

    def write(self, name: str, entries: Sequence[Entry], wrote: Callable[[int], None]) -> None:
        """Write one file; ``wrote(bytes)`` after every piece.

        Raises:
            UserError: it cannot be written, or what a piece raises.
        """
        entries = arrange(entries)
        try:
            with (self.hidden / f"{name}.part").open("wb") as file:
                file.write(header(entries))
                for entry in entries:
                    for piece in entry.pieces():
                        file.write(memoryview(np.ascontiguousarray(piece).reshape(-1)).cast("B"))
                        wrote(piece.nbytes)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.hidden / f"{name}.part", self.hidden / name)
        except OSError as error:
            raise self._cannot(error) from None

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        (self.hidden / name).write_text(text, encoding="utf-8")

    def write_index(self, files: dict[str, list[Entry]]) -> None:
        """The index of all shards."""
        index = {entry.name: name for name, entries in files.items() for entry in entries}
        total = sum(entry.size for entries in files.values() for entry in entries)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=1)
        self.finish_text(INDEX, text + "\n")

    def finish_text(self, name: str, text: str) -> None:
        """Write a small file.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.write_text(name, text)
        except OSError as error:
            raise self._cannot(error) from None

    def publish(self) -> None:
        """Give the folder its name."""
        try:
            (self.hidden / PLAN).unlink()
            os.rename(self.hidden, self.target)
        except OSError as error:
            raise self._cannot(error) from None

    def discard(self) -> None:
        """Remove what there is."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def _cannot(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.target}: {error.strerror or error}")
