"""The losses of one run in memory: columns of numbers, one row per (step, microbatch, rank).

A million entries must fit comfortably, so an entry is not an object: it is a 64-bit key, a float64 and the 16
raw bytes of an MD5, each in its own array.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from align.hashing import tensor_md5
from align.issues import Issues

RANKS = MICROBATCHES = 1 << 16
STEPS = 1 << 31
NO_MD5 = bytes(16)  # what the md5 column holds where the log gave none; no known input hashes to it


class Position(NamedTuple):
    """Which loss: ``step`` counts from 1, ``microbatch`` and ``rank`` from 0."""

    step: int
    microbatch: int
    rank: int


def pack(step: int, microbatch: int, rank: int) -> int:
    """A position as one 64-bit key that sorts like the tuple.

    Raises:
        ValueError: a number is out of range.
    """
    if not (1 <= step < STEPS and 0 <= microbatch < MICROBATCHES and 0 <= rank < RANKS):
        raise ValueError(f"position (step {step}, microbatch {microbatch}, rank {rank}) is out of range")
    return step << 32 | microbatch << 16 | rank


def unpack(key: int) -> Position:
    """The position of a key."""
    key = int(key)
    return Position(key >> 32, key >> 16 & MICROBATCHES - 1, key & RANKS - 1)


def loss_md5(loss: float) -> str:
    """MD5 of the loss's four little-endian float32 bytes, as 32 hex digits (a float64 is rounded first)."""
    with np.errstate(over="ignore"):
        return tensor_md5(np.float32(loss))


def loss_text(loss: float) -> str:
    """The value with 20 decimals, or ``inf``, ``nan``; a float32 above 1e-12 is read back exactly."""
    return f"{loss:.20f}"


class LossSeries:
    """One kind of loss (main or MTP) of a run, sorted by position.

    Attributes:
        keys: int64 [n], strictly increasing, see :func:`pack`.
        values: float64 [n].
        md5s: uint64 [n, 2], the raw bytes of the MD5; all zero where the log gives none.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, md5s: np.ndarray) -> None:
        self.keys, self.values, self.md5s = keys, values, md5s

    @classmethod
    def empty(cls) -> LossSeries:
        """A series without entries."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float64), np.empty((0, 2), np.uint64))

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: np.ndarray | slice) -> LossSeries:
        """The entries at ``index`` (increasing indices, a mask or a slice)."""
        return LossSeries(self.keys[index], self.values[index], self.md5s[index])

    def until(self, step: int | None) -> LossSeries:
        """The entries of steps 1..step (all of them for None)."""
        return (
            self if step is None else self.take(slice(0, int(np.searchsorted(self.keys, (step + 1) << 32))))
        )

    def md5(self, index: int) -> str | None:
        """32 hex digits, or None where the log gives none."""
        raw = self.md5s[index].tobytes()
        return None if raw == NO_MD5 else raw.hex()

    def steps(self) -> int:
        """The number of different steps."""
        return int(np.count_nonzero(np.diff(self.keys >> 32))) + 1 if len(self) else 0


class Rows(NamedTuple):
    """Entries of a log: line numbers int64 [n], keys int64 [n], values float64 [n], MD5s uint64 [n, 2]."""

    lines: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    md5s: np.ndarray


def in_order(parts: list[Rows]) -> Rows:
    """The entries of several parts in the order of their lines."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([part.lines for part in parts]), kind="stable")
    return Rows(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))


def append(column: array, numbers: np.ndarray) -> None:
    """Append numbers to a growing column, as its type."""
    column.frombytes(numbers.astype(column.typecode, copy=False).tobytes())


class SeriesBuilder:
    """Collects the entries of one :class:`LossSeries` in the order of the log."""

    def __init__(self) -> None:
        self.keys, self.values, self.md5s, self.lines = array("q"), array("d"), bytearray(), array("I")

    def __len__(self) -> int:
        return len(self.values)

    def add(self, key: int, value: float, md5: bytes, line: int) -> None:
        """Append the entry at ``line`` of the log; ``md5`` is 16 bytes, :data:`NO_MD5` for none."""
        self.keys.append(key)
        self.values.append(value)
        self.md5s += md5
        self.lines.append(line)

    def extend(self, rows: Rows) -> None:
        """Append many entries at once."""
        append(self.keys, rows.keys)
        append(self.values, rows.values)
        self.md5s += rows.md5s.tobytes()
        append(self.lines, rows.lines)

    def settle(self) -> None:
        """The log is read: drop the line numbers if no two entries can be in conflict."""
        keys = np.frombuffer(self.keys, np.int64)
        if (keys[1:] > keys[:-1]).all():
            self.lines = array("I")

    def build(self, issues: Issues, kind: str) -> LossSeries:
        """Sort, and keep the first of several entries at one position; each further one is an issue."""
        series = LossSeries(
            np.frombuffer(self.keys, np.int64),
            np.frombuffer(self.values, np.float64),
            np.frombuffer(self.md5s, np.uint64).reshape(-1, 2),
        )
        if len(self) < 2 or (series.keys[1:] > series.keys[:-1]).all():
            return series
        order = np.argsort(series.keys, kind="stable")
        series = series.take(order)
        again = np.flatnonzero(series.keys[1:] == series.keys[:-1]) + 1
        firsts = np.searchsorted(series.keys, series.keys[again])
        for index, first in zip(again, firsts, strict=True):
            same = _identical(series, index, first)
            issues.add(
                f"{'duplicate' if same else 'conflicting'} {kind} of {position_text(series.keys[index])}, "
                f"first given in line {self.lines[order[first]]}",
                line=self.lines[order[index]],
            )
        keep = np.ones(len(series), bool)
        keep[again] = False
        return series.take(keep)


def _identical(series: LossSeries, left: int, right: int) -> bool:
    return np.array_equal(series.values[left], series.values[right], equal_nan=True) and bool(
        (series.md5s[left] == series.md5s[right]).all()
    )


def position_text(key: int) -> str:
    """``step 3, microbatch 0, rank 1``."""
    position = unpack(key)
    return f"step {position.step}, microbatch {position.microbatch}, rank {position.rank}"


def merge(first: LossSeries, second: LossSeries, issues: Issues, kind: str) -> LossSeries:
    """The union of two tellings of the same losses; a disagreement is an issue, and the first wins."""
    if not len(second) or not len(first):
        return first if len(first) else second
    index = np.searchsorted(first.keys, second.keys)
    index[index == len(first)] = 0
    known = first.keys[index] == second.keys
    one, other = first.take(index[known]), second.take(known)
    differ = (one.md5s != other.md5s).any(axis=1) & one.md5s.any(axis=1) & other.md5s.any(axis=1)
    differ |= (float32(one.values) != float32(other.values)) & ~(
        np.isnan(one.values) & np.isnan(other.values)
    )
    for key in one.keys[differ]:
        issues.add(f"conflicting {kind} of {position_text(key)}: two kinds of lines disagree")
    keys = np.concatenate([first.keys, second.keys[~known]])
    order = np.argsort(keys, kind="stable")
    return LossSeries(
        keys[order],
        np.concatenate([first.values, second.values[~known]])[order],
        np.concatenate([first.md5s, second.md5s[~known]])[order],
    )


def float32(values: np.ndarray) -> np.ndarray:
    """Rounded to float32; what is too large becomes infinity."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


@dataclass
class LossLog:
    """Everything one run reported.

    Attributes:
        name: how messages call it, usually the file.
        main, mtp: the losses; ``mtp`` is empty for a model without multi-token prediction.
        grad_norms: gradient norm of each step before clipping, at microbatch 0 and rank 0, without MD5s.
        final_weights_md5: MD5 over the raw bytes of all parameters in sorted name order, after the last step.
        header: the ``run`` object of the first line (policy, environment), {} where there is none.
        main_tokens, mtp_tokens: the unreduced losses of logs with ``per_token_loss`` lines; the value of an
            entry is a checksum of the tensor's shape, its MD5 that of the tensor.
        notes: assumptions made while reading, for the reader's eye; they are no issues.
    """

    name: str
    main: LossSeries = field(default_factory=LossSeries.empty)
    mtp: LossSeries = field(default_factory=LossSeries.empty)
    grad_norms: LossSeries = field(default_factory=LossSeries.empty)
    final_weights_md5: str | None = None
    header: dict[str, Any] = field(default_factory=dict)
    main_tokens: LossSeries = field(default_factory=LossSeries.empty)
    mtp_tokens: LossSeries = field(default_factory=LossSeries.empty)
    notes: list[str] = field(default_factory=list)

    def microbatches(self) -> int | None:
        """Microbatches per step, as the positions show; None for an empty log."""
        keys = self.main.keys if len(self.main) else self.mtp.keys
        return int((keys >> 16 & MICROBATCHES - 1).max()) + 1 if len(keys) else None


def parse_number(text: str | float) -> float:
    """A loss from text or a JSON number.

    Raises:
        ValueError: not a number.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)) or "_" in str(text):
        raise ValueError(f"{text!r} is no number")
    try:
        return float(text)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no number") from None
