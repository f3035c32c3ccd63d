"""Loss lines in the text logs that trainers print, anywhere within a line and in any order::

    final_loss: rank=R val=V md5=H
    per_token_loss: rank=R shape=[b, s] md5=H
    [LOSS_PATH_MD5] rank=R loss_sum=V loss_sum_md5=H final_loss=V final_loss_md5=H
    [MTP_LOSS_PATH_MD5] rank=R mtp1.final_loss=V mtp1.final_loss_md5=H
    step N mb M loss V md5 H mtp V md5 H

The first four are positional (see :mod:`align.rawlog`). A ``step`` line names its place, and takes its rank
from a ``rank=R``, ``[rankR]`` or ``[defaultR]`` elsewhere in the line, 0 without one. A line that carries the
marker of a format but not the rest of it is an issue; lines without a marker are other output.
"""

from __future__ import annotations

import re
from binascii import unhexlify
from collections import defaultdict
from collections.abc import Iterable
from itertools import compress
from typing import NamedTuple
from zlib import crc32

import numpy as np

from align.alike import INTEGER, MD5, TEXT, VALUE, Shape, Table, Unlike, tables
from align.losslog import MICROBATCHES, RANKS, STEPS, Rows, in_order
from align.rawlog import RawLog, Stream

_V = rb"([-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|[iI]nf(?:inity)?|[nN]a[nN]))"
# 32 digits and no 33rd, unless that is the f of a final_loss glued to the line by another process
_H = rb"([0-9a-f]{32})(?:(?=final_loss:)|(?![0-9a-fA-F]))"

_FINAL = re.compile(rb"final_loss: rank=(\d{1,9}) val=" + _V + rb" md5=" + _H)
_TOKENS = re.compile(rb"per_token_loss: rank=(\d{1,9}) shape=\[([\d, ]*)\] md5=" + _H)
_MAIN_PATH = re.compile(
    rb"\[LOSS_PATH_MD5\] rank=(\d{1,9}) loss_sum="
    + _V
    + rb" loss_sum_md5="
    + _H
    + rb" final_loss="
    + _V
    + rb" final_loss_md5="
    + _H
)
_MTP_PATH = re.compile(
    rb"\[MTP_LOSS_PATH_MD5\] rank=(\d{1,9}) mtp1\.final_loss=" + _V + rb" mtp1\.final_loss_md5=" + _H
)
_STEP = re.compile(
    rb"step (\d{1,10}) mb (\d{1,9}) loss "
    + _V
    + rb" md5 "
    + _H
    + rb"(?: mtp "
    + _V
    + rb" md5 "
    + _H
    + rb"|(?![^\n]*\bm))"
)
_STEP_MARKER = re.compile(rb"step \d+ mb ")
_RANK = re.compile(rb"rank=(\d{1,9})(?=\s)")
_STEP_RANK = re.compile(rb"\brank=(\d{1,9})\b|\[default(\d{1,9})\]|\[rank(\d{1,9})\]")


class Format(NamedTuple):
    """One kind of line: what it looks like, what gives it away, where it goes, what its groups are."""

    pattern: re.Pattern
    marker: re.Pattern
    kind: str
    fields: tuple[str, ...]


_FORMATS = (
    Format(_FINAL, re.compile(rb"final_loss:"), "final", (INTEGER, VALUE, MD5)),
    Format(_TOKENS, re.compile(rb"per_token_loss:"), "tokens", (INTEGER, TEXT, MD5)),
    Format(_MAIN_PATH, re.compile(rb"\[LOSS_PATH_MD5\]"), "main_path", (INTEGER, VALUE, MD5, VALUE, MD5)),
    Format(_MTP_PATH, re.compile(rb"\[MTP_LOSS_PATH_MD5\]"), "mtp_path", (INTEGER, VALUE, MD5)),
    Format(_STEP, _STEP_MARKER, "step", (INTEGER, INTEGER, VALUE, MD5, VALUE, MD5)),
)


def read_text_lines(raw: RawLog, block: bytes, first_line: int, last: bool) -> None:
    """Add a block of whole lines to ``raw``; ``first_line`` is the number of its first line."""
    try:
        _read_alike(raw, list(tables(block, _learn)), first_line)
    except Unlike:
        _read_found(raw, block, first_line)


def _learn(line: bytes) -> Shape | None:
    markers = [format for format in _FORMATS for _ in format.marker.finditer(line)]
    found = markers[0].pattern.search(line) if len(markers) == 1 else None
    return Shape(line, found, markers[0].fields, markers[0]) if found else None


def _read_alike(raw: RawLog, alike: list[Table], first_line: int) -> None:
    """Add the lines of tables. Nothing is added unless all of them can be."""
    parts = defaultdict(list)
    for table in alike:
        lines, format = table.at + first_line, table.shape.format
        if format.kind == "step":
            keys = _step_keys(table)
            parts["main"].append(Rows(lines, keys, table.values(3), table.md5s(4)))
            if table.has(5):
                parts["mtp"].append(Rows(lines, keys, table.values(5), table.md5s(6)))
            continue
        ranks = table.integers(1)
        if (ranks >= RANKS).any():
            raise Unlike
        md5s = [table.md5s(group) for group, kind in enumerate(format.fields, 1) if kind == MD5]
        last = len(format.fields) - 1  # the loss, before its MD5; the sum of losses before it does not matter
        if format.fields[last - 1] == TEXT:
            values = np.full(len(lines), _shape_code(table.text(last)))
        else:
            values = table.values(last)
        parts[format.kind].append(Rows(lines, ranks, values, md5s[-1]))
    for kind, found in parts.items():
        if kind in ("main", "mtp"):
            getattr(raw, kind).extend(in_order(found))
        else:
            _extend_streams(getattr(raw, kind), in_order(found))


def _step_keys(table: Table) -> np.ndarray:
    steps, microbatches = table.integers(1), table.integers(2)
    rank = _rank_of(table.shape.line)
    if not (steps.all() and (steps < STEPS).all() and (microbatches < MICROBATCHES).all() and rank < RANKS):
        raise Unlike
    return steps << 32 | microbatches << 16 | rank


def _rank_of(line: bytes) -> int:
    """The rank that a ``step`` line names, 0 without one."""
    rank = _STEP_RANK.search(line)
    return int(rank[rank.lastindex]) if rank else 0


def _extend_streams(streams: dict[int, Stream], rows: Rows) -> None:
    """Add positional lines, whose keys are ranks."""
    for rank in np.unique(rows.keys):
        here = rows.keys == rank
        streams[int(rank)].extend(Rows(*(column[here] for column in rows)))


def _read_found(raw: RawLog, block: bytes, first_line: int) -> None:
    """Lines of many kinds, other output between them: one search per format."""
    newlines = None
    for pattern, marker, kind, _ in _FORMATS:
        starts = [found.start() for found in marker.finditer(block)]
        if not starts:
            continue
        if newlines is None:
            newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        lines = (np.searchsorted(newlines, starts) + first_line).tolist()
        rows = pattern.findall(block)
        if len(rows) != len(starts):  # some line is broken: one by one, to find out which
            _read_singly(raw, block, lines, newlines, first_line, pattern, marker, kind)
        elif kind == "step":
            _add_steps(raw, rows, lines, block, newlines, first_line)
        else:
            _add_positional(raw, getattr(raw, kind), rows, lines, pattern)


def _read_singly(
    raw: RawLog,
    block: bytes,
    lines: list[int],
    newlines: np.ndarray,
    first_line: int,
    pattern: re.Pattern,
    marker: re.Pattern,
    kind: str,
) -> None:
    """The lines with a marker, one at a time; one whose marker is not followed by its format is an issue."""
    for number in dict.fromkeys(lines):
        line = _line(block, newlines, number - first_line)
        rows, expected = pattern.findall(line), len(marker.findall(line))
        if kind == "step":
            _add_steps(raw, rows, [number] * len(rows), line, newlines[:0], number)
        else:
            _add_positional(raw, getattr(raw, kind), rows, [number] * len(rows), pattern)
        if len(rows) == expected:
            continue
        raw.issues.add(f"truncated or malformed line: {line[:60].decode('ascii', 'replace')!r}", line=number)
        rank = _RANK.search(line)
        if kind != "step" and expected == 1 and rank and int(rank[1]) < RANKS:
            getattr(raw, kind)[int(rank[1])].skip(number)


def _line(block: bytes, newlines: np.ndarray, index: int) -> bytes:
    start = int(newlines[index - 1]) + 1 if index else 0
    return block[start : int(newlines[index]) if index < len(newlines) else len(block)]


def _add_positional(
    raw: RawLog,
    streams: dict[int, Stream],
    rows: list[tuple[bytes, ...]],
    lines: list[int],
    pattern: re.Pattern,
) -> None:
    if not rows:
        return
    names, *_, texts, md5s = zip(*rows, strict=True)
    ranks = np.fromiter(map(int, names), np.int64)
    read = _shape_code if pattern is _TOKENS else float
    said = Rows(np.array(lines), ranks, np.fromiter(map(read, texts), np.float64), _md5s(md5s))
    legal = ranks < RANKS
    for index in np.flatnonzero(~legal):
        raw.issues.add(f"rank {ranks[index]} is out of range", line=lines[index])
    _extend_streams(streams, said if legal.all() else Rows(*(column[legal] for column in said)))


def _shape_code(shape: bytes) -> float:
    """Equal for equal shapes."""
    return float(crc32(shape.replace(b" ", b"")))


def _md5s(digits: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(unhexlify(b"".join(digits)), np.uint64).reshape(-1, 2)


def _add_steps(
    raw: RawLog,
    rows: list[tuple[bytes, ...]],
    lines: list[int],
    block: bytes,
    newlines: np.ndarray,
    first_line: int,
) -> None:
    if not rows:
        return
    steps, microbatches, main, main_md5s, mtp, mtp_md5s = zip(*rows, strict=True)
    steps, microbatches = (
        np.fromiter(map(int, steps), np.int64),
        np.fromiter(map(int, microbatches), np.int64),
    )
    ranks = np.zeros(len(rows), np.int64)
    if b"rank" in block or b"[default" in block:
        for index, line in enumerate(lines):
            ranks[index] = _rank_of(_line(block, newlines, line - first_line))
    legal = (steps >= 1) & (steps < STEPS) & (microbatches < MICROBATCHES) & (ranks < RANKS)
    for index in np.flatnonzero(~legal):
        raw.issues.add(
            f"step {steps[index]}, microbatch {microbatches[index]}, rank {ranks[index]} is out of range",
            line=lines[index],
        )
    keys = steps << 32 | microbatches << 16 | ranks
    for builder, texts, md5s in ((raw.main, main, main_md5s), (raw.mtp, mtp, mtp_md5s)):
        here = np.fromiter(map(bool, texts), bool) & legal
        values = np.fromiter(map(float, compress(texts, here)), np.float64)
        builder.extend(Rows(np.array(lines)[here], keys[here], values, _md5s(compress(md5s, here))))
