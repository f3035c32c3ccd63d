"""Lines that look alike, read as columns of bytes: what makes logs of a million lines quick to read.

A trainer prints one line over and over with other digits. The first such line is understood by a regular expression
and becomes a :class:`Shape`; lines of its length that have a digit where it has a digit of a field, and the same byte
everywhere else, say the same with other numbers. A block with a line that fits no shape is left to the careful
reader, so this one may refuse whatever it likes.
"""

from __future__ import annotations

import re
from binascii import Error, hexlify, unhexlify
from collections.abc import Callable, Iterator

import numpy as np

from align.decimals import MOST_DECIMALS, MOST_DIGITS, decimals, weights

MOST_SHAPES = 32  # per block; a block with more is no series of like lines
INTEGER, VALUE, MD5, TEXT = "integer", "value", "md5", "text"
_DECIMAL = re.compile(rb"-?(\d+)\.(\d+)")
_ZERO, _NINE, _F = b"09f"


class Unlike(Exception):
    """The block needs the careful reader."""


class Shape:
    """One line as the model of others.

    Args:
        line: the line, without its newline.
        found: the match of its format's pattern in the line.
        fields: what each group of the pattern is: INTEGER, VALUE, MD5 or TEXT (equal in all lines).
        format: whatever the reader wants to know about the line.
    """

    def __init__(self, line: bytes, found: re.Match, fields: tuple[str, ...], format: object) -> None:
        self.line, self.found, self.fields, self.format = line, found, fields, format
        self.low = np.frombuffer(line, np.uint8).copy()
        self.width = np.zeros(len(line), np.uint8)
        for group, kind in enumerate(fields, 1):
            start, end = found.span(group)
            if kind == VALUE and not _DECIMAL.fullmatch(line, start, end):
                kind = TEXT  # nan, inf, 1e-5: equal in all lines
            if start < 0 or kind == TEXT:
                continue
            for column in range(start, end):
                if line[column] not in b"-.":
                    self.low[column] = _ZERO
                    self.width[column] = (_F if kind == MD5 else _NINE) - _ZERO

    def __len__(self) -> int:
        return len(self.line)


class Table:
    """Lines of one shape. ``at`` [n] says which lines of the block they are, from 0."""

    def __init__(self, shape: Shape, at: np.ndarray, rows: np.ndarray, offsets: np.ndarray) -> None:
        self.shape, self.at, self.rows, self.offsets = shape, at, rows, offsets

    def __len__(self) -> int:
        return len(self.at)

    def has(self, group: int) -> bool:
        """Does the pattern's group take part in the match?"""
        return self.shape.found.start(group) >= 0

    def text(self, group: int) -> bytes:
        """The text of a group that is equal in all lines."""
        return self.shape.found[group]

    def integers(self, group: int) -> np.ndarray:
        """int64 [n], without needless zeros in front."""
        start, end = self.shape.found.span(group)
        if end - start > 18 or (end - start > 1 and not self.offsets[:, start].all()):
            raise Unlike
        total = self.offsets[:, start].astype(np.int64)
        for column in range(start + 1, end):
            total = total * 10 + self.offsets[:, column]
        return total

    def values(self, group: int) -> np.ndarray:
        """float64 [n], as ``float()`` reads them."""
        start, end = self.shape.found.span(group)
        decimal = _DECIMAL.fullmatch(self.shape.line, start, end)
        if not decimal:
            try:
                return np.full(len(self), float(self.text(group)))
            except ValueError:
                raise Unlike from None
        whole, fraction = len(decimal[1]), len(decimal[2])
        if whole + fraction > MOST_DIGITS or fraction > MOST_DECIMALS:
            raise Unlike
        places = [*range(whole + fraction - 1, fraction - 1, -1), None, *range(fraction - 1, -1, -1)]
        start = decimal.start(1)
        halves = self.offsets[:, start:end].astype(np.float64) @ weights(places)
        values, certain = decimals(halves[:, 0], halves[:, 1], fraction)
        for index in np.flatnonzero(~certain):
            values[index] = float(self.rows[index, start:end].tobytes())
        return -values if self.shape.line[start - 1 : start] == b"-" else values

    def md5s(self, group: int) -> np.ndarray:
        """uint64 [n, 2], the raw bytes of the MD5s."""
        start, end = self.shape.found.span(group)
        digits = self.rows[:, start:end].tobytes()
        try:
            raw = unhexlify(digits)
        except Error:
            raise Unlike from None
        if hexlify(raw) != digits:  # upper case
            raise Unlike
        return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def tables(block: bytes, learn: Callable[[bytes], Shape | None]) -> Iterator[Table]:
    """The lines of a block of whole lines as tables, blank lines left out.

    Args:
        block: ends with a newline.
        learn: the shape of a line; None for a line that says anything but one entry.

    Raises:
        Unlike: some line has no shape, or there are too many shapes.
    """
    if not block.endswith(b"\n"):
        raise Unlike
    data, left = np.frombuffer(block, np.uint8), MOST_SHAPES
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    for length in np.unique(lengths[lengths > 0]):
        at = np.flatnonzero(lengths == length)
        rows = np.lib.stride_tricks.sliding_window_view(data, length)[starts[at]]
        while len(at):
            shape = learn(rows[0].tobytes())
            if shape is None or not left:
                raise Unlike
            left -= 1
            offsets = rows - shape.low  # bytes below `low` wrap around to large numbers
            alike = offsets <= shape.width
            if alike.all():
                yield Table(shape, at, rows, offsets)
                break
            alike = alike.all(axis=1)
            yield Table(shape, at[alike], rows[alike], offsets[alike])
            at, rows = at[~alike], rows[~alike]
