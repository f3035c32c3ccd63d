"""A folder that appears whole or not at all, and the two files that hold one kind of tensors."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from align.hashing import tensor_md5
from paddledsv4.errors import UserError

# numpy has no bfloat16, so uint16 holds its bits; no tensor of a trace is a true uint16
_DTYPES = {"uint16": "bfloat16"}
_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
                "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


def dtype_of(tensor: np.ndarray) -> str:
    """Torch's name of the dtype, without its prefix."""
    return _DTYPES.get(tensor.dtype.name, tensor.dtype.name)


class Folder:
    """Collects files in a hidden folder beside ``path`` and renames it to ``path`` on :meth:`commit`.

    As a context manager it commits when the block ends well, and leaves nothing behind when the block raises.

    Raises:
        UserError: ``path`` is there already and holds something, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} is there already: choose another --out, or remove it")
        self.hidden = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.hidden.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --out") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.commit() if kind is None else self.discard()

    def json(self, name: str, value: Any) -> None:
        """Write ``value`` to the file ``name``, folders in between included."""
        path = self.hidden / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def weights(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        """Write a safetensors file ``name``."""
        path = self.hidden / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, tensors)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def tensors(self, kind: str, tensors: dict[str, np.ndarray], norms: bool = False) -> None:
        """Write ``kind``.safetensors and ``kind``.json; with ``norms``, float tensors get theirs in the json."""
        self.weights(f"{kind}.safetensors", tensors)
        self.json(f"{kind}.json", {name: describe(tensor, norms) for name, tensor in tensors.items()})

    def commit(self) -> None:
        """Give the folder its name."""
        try:
            os.replace(self.hidden, self.path)
        except OSError as error:
            self.discard()
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def discard(self) -> None:
        """Remove what was collected."""
        shutil.rmtree(self.hidden, ignore_errors=True)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file straight from the arrays' memory.

    The safetensors package takes no bfloat16 from numpy, and its versions disagree on how to hand it raw bytes.
    """
    tensors = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    header, offset = {}, 0
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # wide ones first keeps all aligned
    for name in ordered:
        end = offset + tensors[name].nbytes
        dtype = _SAFETENSORS[dtype_of(tensors[name])]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            file.write(tensors[name].reshape(-1).view(np.uint8))


def describe(tensor: np.ndarray, norm: bool = False) -> list[Any]:
    """[shape, dtype, md5] of a tensor, and its Euclidean norm if asked for."""
    entry: list[Any] = [list(tensor.shape), f"torch.{dtype_of(tensor)}", tensor_md5(tensor)]
    return [*entry, float(np.linalg.norm(as_float(tensor)))] if norm else entry


def as_float(tensor: np.ndarray) -> np.ndarray:
    """Flat, bfloat16 widened to float32."""
    if dtype_of(tensor) == "bfloat16":
        tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.reshape(-1)


def trace_folder(step: int, microbatch: int | None = None) -> str:
    """Where a microbatch of a step is stored; without one, what belongs to the step."""
    if step == 1 and not microbatch:
        return "trace"
    return f"trace/step{step:06d}" + ("" if microbatch is None else f"-mb{microbatch}")
