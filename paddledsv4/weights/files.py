"""safetensors files: what they hold, and reads of exactly the bytes that are wanted.

The safetensors library checks a file; its numpy side has neither FP8 nor bfloat16, and copies whole tensors, so bytes
are read here, by position, straight into the memory that wants them. Nothing is mapped: mapped pages would count as
memory of the process.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from typing_extensions import Self

from paddledsv4.config.files import read_mapping
from paddledsv4.errors import UserError
from paddledsv4.weights.storage import NUMPY

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``size`` bytes from ``offset`` on."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"

    def piece(self, part: int, parts: int, shape: tuple[int, ...]) -> Stored:
        """One of equal pieces along the first dimensions."""
        size = self.size // parts
        return replace(self, shape=shape, offset=self.offset + part * size, size=size)

    def at(self, start: int, like: np.ndarray) -> Stored:
        """As many bytes from ``start`` on as ``like`` has, as an array like it."""
        return replace(self, shape=like.shape, offset=self.offset + start, size=like.nbytes)


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by name.

    Raises:
        UserError: it cannot be read, is cut off, damaged or no safetensors file, or has a dtype that no checkpoint of
            this model has.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            end = os.fstat(file.fileno()).st_size
            text = file.read(length) if 0 < length <= end - 8 else b""
        with safe_open(path, "numpy"):
            pass  # the library has looked at it
        header = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(_damage(path, text, end - 8 - length, error)) from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in NUMPY:
            raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']}; known are {', '.join(NUMPY)}")
    return {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: dict, data: int) -> Stored:
    start, end = entry["data_offsets"]
    return Stored(path, name, entry["dtype"], tuple(entry["shape"]), data + start, end - start)


def _damage(path: Path, text: bytes, data: int, error: Exception) -> str:
    """What is wrong with a file; of one that is cut off, the first tensor that is not whole. ``data``: bytes of it."""
    try:
        header = json.loads(text)
        ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")
        lost = [name for end, name in ends if end > data]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        lost = []
    if lost:
        return f"{path}: is cut off in tensor {lost[0]}, {len(lost)} of {len(ends)} are not whole; fetch it again"
    return f"{path}: is damaged or no safetensors file ({error}); fetch it again"


def read_folder(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint: a folder with an index, or with ``model.safetensors``, or one file.

    Raises:
        UserError: no such files, a file that is damaged, or an index that disagrees with its files.
    """
    if path.is_file():
        return read_header(path)
    if (path / INDEX).exists():
        return _indexed(path)
    files = [path / SINGLE] if (path / SINGLE).exists() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} safetensors files" if files else "no safetensors file"
        raise UserError(f"{path}: has {found} and no {INDEX}")
    return read_header(files[0])


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file.

    Raises:
        UserError: not an index, or one that names files elsewhere.
    """
    index = read_mapping(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{path}: has no weight_map of tensors to files")
    for name, file in index.items():
        if Path(file).name != file:
            raise UserError(f"{path}: tensor {name} is said to be in {file}, which is not a file of this folder")
    return index


def _indexed(folder: Path) -> dict[str, Stored]:
    index = read_index(folder / INDEX)
    found: dict[str, Stored] = {}
    for file in sorted(set(index.values())):
        header = read_header(folder / file)
        for name, stored in header.items():
            if index.get(name) != file:
                raise UserError(f"{stored} is not listed for this file in {INDEX}")
        found |= header
    missing = next((name for name in index if name not in found), None)
    if missing:
        raise UserError(f"{folder / index[missing]}: tensor {missing} is missing, which {INDEX} lists there")
    return found


class Files:
    """Open files to read pieces of tensors from, by several threads if need be."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._opening = threading.Lock()

    def read(self, stored: Stored) -> np.ndarray:
        """The bytes in a new array of the stored shape."""
        out = np.empty(stored.shape, NUMPY[stored.dtype])
        self.read_into(stored, out)
        return out

    def read_into(self, stored: Stored, out: np.ndarray) -> None:
        """The same into the memory of ``out``, contiguous and of the same size in bytes.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        if not stored.size:
            return
        view, done = memoryview(out.reshape(-1)).cast("B"), 0
        try:
            with self._opening:
                if stored.file not in self._open:
                    self._open[stored.file] = os.open(stored.file, os.O_RDONLY)
            while done < stored.size:
                count = os.preadv(self._open[stored.file], [view[done:]], stored.offset + done)
                if not count:
                    raise UserError(f"{stored} is cut off; fetch the file again")
                done += count
        except OSError as error:
            raise UserError(f"{stored} cannot be read ({error.strerror})") from None

    def close(self) -> None:
        """Close all."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
