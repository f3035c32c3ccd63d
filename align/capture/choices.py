"""How narrowly a top-k was decided: the distance between the last chosen and the first rejected score."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.capture.store import Folder
from align.hashing import tensor_md5

EDGES = tuple(10.0**exponent for exponent in range(-8, 2))


def margins(scores: np.ndarray, chosen: int) -> np.ndarray:
    """scores [..., n], -inf where nothing may be chosen -> float32 [...]: infinite where nothing was rejected.

    NaN among the scores gives NaN: no margin can be told.
    """
    if scores.shape[-1] <= chosen:
        return np.full(scores.shape[:-1], np.inf, np.float32)
    wanted = scores.shape[-1] - chosen
    parted = np.partition(scores, (wanted - 1, wanted), axis=-1)  # NaN sorts last
    last, first_rejected = parted[..., wanted], parted[..., wanted - 1]
    with np.errstate(invalid="ignore"):
        margin = np.where(np.isneginf(first_rejected), np.inf, last - first_rejected)
    return np.where(np.isnan(scores).any(-1), np.nan, margin).astype(np.float32)


def causal(scores: np.ndarray, ratio: int, offset: int = 0) -> np.ndarray:
    """scores [b, s, g] with -inf for the entries that a query cannot see: those not complete at its position, which is
    ``offset`` for the first query."""
    visible = (np.arange(scores.shape[1]) + 1 + offset) // ratio
    return np.where(np.arange(scores.shape[2]) < visible[:, None], scores, -np.inf)


def summary(margin: np.ndarray) -> dict[str, Any]:
    """Minimum over the tokens with a rejected score, and below which power of ten how many of them lie."""
    told = margin[~np.isinf(margin)]
    below = {f"{edge:.0e}": int((told < edge).sum()) for edge in EDGES}
    return {
        "tokens": int(told.size),
        "undecided": int((told == 0).sum()),
        "nan": int(np.isnan(told).sum()),
        "min": float(told.min()) if told.size else None,
        "below": below,
    }


class Choices:
    """The choices of one pass: what was chosen, and by which margin."""

    def __init__(self) -> None:
        self.chosen: dict[str, np.ndarray] = {}
        self.margin: dict[str, np.ndarray] = {}

    def write(self, folder: Folder, where: str) -> None:
        """Write ``where``/choices.safetensors and .json."""
        margin = {f"{name}@margin": values for name, values in self.margin.items()}
        folder.weights(f"{where}/choices.safetensors", self.chosen | margin)
        described = {
            name: {
                "chosen": list(tensor.shape),
                "md5": tensor_md5(tensor),
                "margin": summary(self.margin[name]) if name in self.margin else "none: looked up in a table",
            }
            for name, tensor in self.chosen.items()
        }
        folder.json(f"{where}/choices.json", described)
