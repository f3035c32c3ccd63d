"""Compare two files of tensors, such as traces of attention: bit by bit, by name, in the order of the forward pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from align.tensors import read_tensors
from align.ulp import ulp_distance
from paddledsv4.errors import UserError

SHOWN = 20  # tensors that differ, in words


@dataclass(frozen=True)
class Difference:
    """How a tensor differs; ``text`` says it in words."""

    name: str
    text: str


@dataclass(frozen=True)
class TensorComparison:
    """``equal`` of ``compared`` tensors have the same bits and no NaN; ``differences`` in the reference's order."""

    compared: int
    equal: int
    differences: list[Difference]

    @property
    def exit_code(self) -> int:
        """0 if everything is equal and there was something to compare."""
        return int(self.compared == 0 or bool(self.differences))

    def render(self) -> str:
        """For people: what differs, first the first."""
        lines = [f"{d.name}: {d.text}" for d in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            lines.append(f"... and {len(self.differences) - SHOWN} more")
        first = self.differences[0].name if self.differences else None
        return "\n".join([*lines, f"tensor_matches={self.equal}/{self.compared}", f"first_tensor_diff={first}"])


def compare_tensor_files(reference: Path, candidate: Path) -> TensorComparison:
    """Every tensor of the reference against the one of its name; names that only one file has are differences.

    Raises:
        UserError: a file is missing or damaged.
    """
    left, right = (read_tensors(path, widen=False) for path in (reference, candidate))
    kinds = [_kinds(path) for path in (reference, candidate)]
    names = [name for name in _order(reference) if name in left]
    names += [name for name in left if name not in names]
    found = []
    for name in names:
        if name not in right:
            found.append(Difference(name, "is missing in the candidate"))
        elif text := _difference(left[name], right[name], *(kind[name] for kind in kinds)):
            found.append(Difference(name, text))
    equal = len(names) - len(found)
    found += [Difference(name, "is not in the reference") for name in right if name not in left]
    return TensorComparison(len(names), equal, found)


def _difference(left: np.ndarray, right: np.ndarray, kind: str, other_kind: str) -> str:
    """In words; "" for tensors with the same bits, none of them NaN."""
    if (left.shape, kind) != (right.shape, other_kind):
        return f"is {other_kind} {list(right.shape)}, the reference's {kind} {list(left.shape)}"
    a, b = _values(left, kind), _values(right, kind)
    nan = int((a != a).sum()), int((b != b).sum())
    if any(nan):
        return f"has NaN: {nan[0]} in the reference, {nan[1]} in the candidate"
    if left.tobytes() == right.tobytes():
        return ""
    bytes_of = [x.reshape(-1).view(np.uint8).reshape(left.size, -1) for x in (left, right)]
    different = bytes_of[0] != bytes_of[1]
    share = f"{int(different.any(1).sum())} of {left.size} differ"
    if a.dtype.kind != "f":
        return share
    largest = np.abs(a.astype(np.float64) - b).max()
    norm = np.sqrt(np.square(a, dtype=np.float64).sum())
    relative = np.sqrt(np.square(a.astype(np.float64) - b).sum()) / norm if norm else np.inf
    ulp = f", {ulp_distance(a, b).max() / (2**16 if kind == 'BF16' else 1):.3g} ULP" if a.dtype == np.float32 else ""
    return f"{share}, by at most {largest:.3g}{ulp}, relative L2 {relative:.2e}"


def _values(stored: np.ndarray, kind: str) -> np.ndarray:
    """bfloat16 as the float32 with the same values."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else stored


def _kinds(path: Path) -> dict[str, str]:
    """name -> dtype as the file says."""
    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def _order(path: Path) -> list[str]:
    """The names in the order that the file's metadata states, if it does."""
    try:
        with safe_open(path, "np") as file:
            names = json.loads((file.metadata() or {}).get("order", "[]"))
    except (ValueError, SafetensorError):
        raise UserError(f"{path}: its metadata is damaged; record it again") from None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
