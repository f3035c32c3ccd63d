"""One set of tensors from those that the ranks of a parallel job hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.weights.names import expert_index, from_megatron, with_expert


@dataclass(frozen=True)
class Holder:
    """One rank: where its experts begin, and which of its dense tensors are pieces.

    ``split`` maps our name of a tensor to the dimension that tensor parallelism cuts.
    """

    path: Path
    tensor_rank: int
    first_expert: int
    split: dict[str, int]

    @classmethod
    def of(cls, rank: dict[str, Any], described: dict[str, Any], experts: int, path: Path) -> Holder:
        """Read off a rank's bundle.json."""
        parallel = described["parallel"]
        split = {} if parallel["tensor"] == 1 else rank.get("split", {})
        split = {from_megatron(n): dim for n, dim in split.items() if dim >= 0}
        split = {n: dim for n, dim in split.items() if expert_index(n) is None}
        return cls(path, rank["tensor"], rank["expert"] * (experts // parallel["expert"]), split)

    def global_name(self, name: str) -> str:
        """The name of a tensor in the merged bundle; a prefix such as "m/" stays."""
        index = expert_index(name)
        return name if index is None else with_expert(name, index + self.first_expert)

    def is_split(self, name: str) -> bool:
        """Whether this rank holds a piece of it."""
        return name.rsplit("/", 1)[-1] in self.split


def unify(holders: list[Holder], tensors: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Global name -> whole tensor.

    Raises:
        UserError: a tensor that several ranks hold whole is not the same on all of them; the first one is named.
    """
    whole: dict[str, np.ndarray] = {}
    pieces: dict[str, dict[int, np.ndarray]] = {}
    origin: dict[tuple[str, int | None], Path] = {}
    for holder, own in zip(holders, tensors, strict=True):
        for local, tensor in own.items():
            name = holder.global_name(local)
            into, key = (pieces.setdefault(name, {}), holder.tensor_rank) if holder.is_split(local) else (whole, name)
            at = (name, holder.tensor_rank if holder.is_split(local) else None)
            if key in into and not same_bits(into[key], tensor):
                raise UserError(f"{name} differs between {origin[at]} and {holder.path}, whose ranks share it")
            into.setdefault(key, tensor)
            origin.setdefault(at, holder.path)
    for name, parts in pieces.items():
        dimension = next(h.split[name.rsplit("/", 1)[-1]] for h in holders if h.is_split(name))
        whole[name] = join(name, [parts[rank] for rank in sorted(parts)], dimension)
    return whole


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal shape, dtype and bytes; 0 differs from -0. Bytes of a NaN count too: a run that went wrong can be put
    together and looked at, while every comparison of what is put together refuses it."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def join(name: str, pieces: list[np.ndarray], dimension: int) -> np.ndarray:
    """The pieces side by side; of a gated first layer, each piece is half gate and half linear."""
    if name.endswith("linear_fc1.weight"):
        halves = [np.split(piece, 2, axis=dimension) for piece in pieces]
        return np.concatenate([gate for gate, _ in halves] + [linear for _, linear in halves], dimension)
    return np.concatenate(pieces, dimension)
