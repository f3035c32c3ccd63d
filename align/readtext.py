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
from array import array
from binascii import unhexlify
from itertools import compress
from zlib import crc32

import numpy as np

from align.losslog import MICROBATCHES, RANKS, STEPS
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


_FORMATS = (
    (_FINAL, re.compile(rb"final_loss:"), "final"),
    (_TOKENS, re.compile(rb"per_token_loss:"), "tokens"),
    (_MAIN_PATH, re.compile(rb"\[LOSS_PATH_MD5\]"), "main_path"),
    (_MTP_PATH, re.compile(rb"\[MTP_LOSS_PATH_MD5\]"), "mtp_path"),
    (_STEP, _STEP_MARKER, "step"),
)


def read_text_lines(raw: RawLog, block: bytes, first_line: int, last: bool) -> None:
    """Add a block of whole lines to ``raw``; ``first_line`` is the number of its first line."""
    newlines = None
    for pattern, marker, kind in _FORMATS:
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
    values = _shape_codes(texts) if pattern is _TOKENS else array("d", map(float, texts))
    raw_md5s = unhexlify(b"".join(md5s))
    ranks = {name: int(name) for name in set(names)}
    if len(ranks) == 1 and ranks[names[0]] < RANKS:
        streams[ranks[names[0]]].extend(values, raw_md5s, lines)
        return
    for index, name in enumerate(names):
        if ranks[name] >= RANKS:
            raw.issues.add(f"rank {ranks[name]} is out of range", line=lines[index])
        else:
            streams[ranks[name]].append(values[index], raw_md5s[16 * index : 16 * index + 16], lines[index])


def _shape_codes(shapes: tuple[bytes, ...]) -> array:
    """A number per shape, equal for equal shapes."""
    return array("d", (crc32(shape.replace(b" ", b"")) for shape in shapes))


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
            rank = _STEP_RANK.search(_line(block, newlines, line - first_line))
            ranks[index] = int(rank[rank.lastindex]) if rank else 0
    legal = (steps >= 1) & (steps < STEPS) & (microbatches < MICROBATCHES) & (ranks < RANKS)
    for index in np.flatnonzero(~legal):
        raw.issues.add(
            f"step {steps[index]}, microbatch {microbatches[index]}, rank {ranks[index]} is out of range",
            line=lines[index],
        )
    keys = steps << 32 | microbatches << 16 | ranks
    for builder, texts, md5s in ((raw.main, main, main_md5s), (raw.mtp, mtp, mtp_md5s)):
        here = np.fromiter(map(bool, texts), bool) & legal
        builder.extend(
            keys[here],
            array("d", map(float, compress(texts, here))),
            unhexlify(b"".join(compress(md5s, here))),
            array("I", compress(lines, here)),
        )
