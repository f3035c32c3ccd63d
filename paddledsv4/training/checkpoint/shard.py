"""The file of one rank: pieces of tensors in the safetensors format.

A piece says where it lies in the whole tensor, so that ranks of another layout find what they need. Beside the file,
a JSON of the same name lists the pieces with a CRC-32 each, which costs a quarter of an MD5 and names the tensor that
is damaged. Plain Python and numpy: other threads go on while a thread writes and hashes, since both release Python's
lock, and safetensors' own writer gives no digest and does not wait for the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddledsv4.errors import UserError

# safetensors' name -> numpy's; numpy has no bfloat16, whose bits travel as uint16
DTYPES = {
    "F64": "<f8", "F32": "<f4", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """The elements of tensor ``name`` from ``offset`` on, ``shape`` of them; whole, if that is ``global_shape``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Iterable[int]) -> Piece:
        """A tensor that one rank holds all of."""
        shape = tuple(shape)
        return cls(name, dtype, shape, shape, (0,) * len(shape))

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Wide numbers first, so that every tensor is aligned; then by name."""
    return sorted(pieces, key=lambda p: (-np.dtype(DTYPES[p.dtype]).itemsize, p.name))


def places(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, int, int]]:
    """Each piece with its first byte in the data, and the first byte after it."""
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.bytes
        yield piece, begin, end


def header(pieces: list[Piece]) -> bytes:
    """The beginning of a safetensors file with these pieces in this order."""
    entries = {
        piece.name: {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
        for piece, begin, end in places(pieces)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, pieces: list[Piece], arrays: list[np.ndarray]) -> dict[str, Any]:
    """Write pieces, whose numbers are ``arrays``, and return the record of the file when it is on the disk.

    The MD5 is computed beside the writing: it takes about as long as a fast disk does.
    """
    datas = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    with ThreadPoolExecutor(1, "md5") as beside, path.open("wb", buffering=0) as file:
        md5 = beside.submit(_md5, [header(pieces), *datas])
        listed = []
        _write_all(file, header(pieces))
        for piece, data in zip(pieces, datas, strict=True):
            _write_all(file, data)
            listed.append(asdict(piece) | {"crc32": zlib.crc32(data)})
        os.fsync(file.fileno())
        return {"file": path.name, "bytes": file.tell(), "md5": md5.result(), "tensors": listed}


def _write_all(file: io.RawIOBase, data: bytes | np.ndarray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]  # one call writes 2 GiB at most


def _md5(parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.md5()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class ShardFile:
    """A written file, of which only what is asked for is read.

    Args:
        record: what :func:`write` returned for it.

    Raises:
        UserError: the file is missing, too short or too long, or its header is not the recorded one.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.path = folder / record["file"]
        entries = [dict(entry) for entry in record["tensors"]]
        self.checks = {entry["name"]: entry.pop("crc32") for entry in entries}
        sizes = ("shape", "global_shape", "offset")
        pieces = [Piece(**entry | {key: tuple(entry[key]) for key in sizes}) for entry in entries]
        self.pieces = {piece.name: piece for piece in pieces}
        for piece in pieces:
            if not len(piece.shape) == len(piece.global_shape) == len(piece.offset):
                raise UserError(f"{self.path}: the list of its tensors is damaged: {piece.name} has no one place")
        start = header(pieces)
        self.begins = {piece.name: len(start) + begin for piece, begin, _ in places(pieces)}
        self._check_size(record["bytes"])
        if len(start) + sum(piece.bytes for piece in pieces) != record["bytes"]:
            raise UserError(f"{self.path}: the list of its tensors is damaged: they do not add up to its size")
        if self._read(0, len(start)).tobytes() != start:
            raise UserError(f"{self.path}: the header is damaged: it does not list the tensors that were written")

    def _check_size(self, expected: int) -> None:
        try:
            size = self.path.stat().st_size
        except OSError as error:
            held = f"; it holds {len(self.pieces)} tensors, the first is {next(iter(self.pieces), None)}"
            raise UserError(f"{self.path}: cannot be read ({error.strerror}){held}") from None
        if size != expected:
            cut = next((n for n, p in self.pieces.items() if self.begins[n] + p.bytes > size), None)
            what = f"truncated: tensor {cut} is not whole" if cut else "not what was written"
            raise UserError(f"{self.path}: has {size} bytes instead of {expected}; {what}")

    def read(self, piece: Piece) -> np.ndarray:
        """The piece, checked. bfloat16 comes as uint16.

        Raises:
            UserError: its bytes are not those that were written.
        """
        data = self._read(self.begins[piece.name], piece.bytes)
        if zlib.crc32(data) != self.checks[piece.name]:
            raise UserError(f"{self.path}: tensor {piece.name} is damaged: its CRC-32 is not the recorded one")
        return data.view(DTYPES[piece.dtype]).reshape(piece.shape)

    def _read(self, begin: int, size: int) -> np.ndarray:
        data, done = np.empty(size, np.uint8), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                while done < size and (more := file.readinto(memoryview(data)[done:])):
                    done += more
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        return data
