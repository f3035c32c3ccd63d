"""JSON-lines logs: the format of a bundle's losses.jsonl and of what ``align run`` writes.

A block of lines that all look as our writer prints them is read by columns (:mod:`align.alike`); any other block
goes line by line through the JSON parser, which accepts every spelling and explains what it refuses.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from align.alike import INTEGER, MD5, VALUE, Shape, Table, Unlike, tables
from align.losslog import NO_MD5, Rows, in_order, pack, parse_number
from align.rawlog import RawLog

_VALUE = rb'"([-+.0-9a-z]{1,400})"'
_MD5 = rb'"([0-9a-f]{32})"'
_ENTRY = re.compile(
    rb'\{"step": ([1-9]\d{0,8}), "microbatch": (\d{1,4}), "rank": (\d{1,4}), "main_loss": %b, "main_md5": %b'
    rb'(?:, "mtp_loss": %b, "mtp_md5": %b)?\}\r?' % (_VALUE, _MD5, _VALUE, _MD5)
)
_NORM = re.compile(rb'\{"step": ([1-9]\d{0,8}), "grad_norm": %b\}\r?' % _VALUE)
_FIELDS = {_ENTRY: (INTEGER, INTEGER, INTEGER, VALUE, MD5, VALUE, MD5), _NORM: (INTEGER, VALUE)}
_HEX = re.compile(r"[0-9a-f]{32}")


def read_json_lines(raw: RawLog, block: bytes, first_line: int, last: bool) -> None:
    """Add a block of whole lines to ``raw``; ``first_line`` is the number of its first line.

    Lines that say nothing we know become issues. ``last`` says that the block ends the file.
    """
    try:
        _read_alike(raw, list(tables(block, _learn)), first_line)
    except Unlike:
        _read_singly(raw, block, first_line, last)


def _learn(line: bytes) -> Shape | None:
    for pattern, fields in _FIELDS.items():
        if found := pattern.fullmatch(line):
            return Shape(line, found, fields, pattern)
    return None


def _read_alike(raw: RawLog, alike: list[Table], first_line: int) -> None:
    """Add lines as our writer prints them. Nothing is added unless all of them can be."""
    main, mtp, norms = [], [], []
    for table in alike:
        lines, steps = table.at + first_line, table.integers(1)
        if not steps.all():
            raise Unlike
        if table.shape.format is _NORM:
            norms.append(Rows(lines, steps << 32, table.values(2), np.zeros((len(lines), 2), np.uint64)))
            continue
        keys = steps << 32 | table.integers(2) << 16 | table.integers(3)
        main.append(Rows(lines, keys, table.values(4), table.md5s(5)))
        if table.has(6):
            mtp.append(Rows(lines, keys, table.values(6), table.md5s(7)))
    for builder, parts in ((raw.main, main), (raw.mtp, mtp), (raw.grad_norms, norms)):
        if parts:
            builder.extend(in_order(parts))


def _read_singly(raw: RawLog, block: bytes, first_line: int, last: bool) -> None:
    lines = block.split(b"\n")
    for offset, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            _read_line(raw, json.loads(line), first_line + offset)
        except (ValueError, TypeError, RecursionError) as error:
            cut = (
                last and offset == len(lines) - 1
            )  # split leaves a last item only where the newline is missing
            what = "the last line is truncated" if cut else f"malformed line: {error}"
            raw.issues.add(what, line=first_line + offset)


def _read_line(raw: RawLog, said: Any, line: int) -> None:
    if not isinstance(said, dict):
        raise TypeError("not a JSON object")
    if "run" in said:
        if raw.header or not isinstance(said["run"], dict):
            raise ValueError("a second header, or one that is no object")
        raw.header = said["run"]
    elif "final_weights_md5" in said:
        if raw.final_weights_md5 is not None:
            raise ValueError("a second final_weights_md5")
        raw.final_weights_md5 = _md5(said, "final_weights_md5")
    elif "grad_norm" in said:
        raw.grad_norms.add(pack(_count(said, "step"), 0, 0), parse_number(said["grad_norm"]), NO_MD5, line)
    elif "main_loss" in said or "mtp_loss" in said:
        key = pack(_count(said, "step"), _count(said, "microbatch"), _count(said, "rank"))
        losses = [
            (builder, parse_number(said[f"{kind}_loss"]), _md5(said, f"{kind}_md5"))
            for kind, builder in (("main", raw.main), ("mtp", raw.mtp))
            if said.get(f"{kind}_loss") is not None
        ]
        for builder, value, md5 in losses:
            builder.add(key, value, bytes.fromhex(md5) if md5 else NO_MD5, line)
    else:
        raise ValueError(f"neither a loss nor a gradient norm (keys: {', '.join(map(str, said)) or 'none'})")


def _count(said: dict[str, Any], name: str) -> int:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    return value


def _md5(said: dict[str, Any], name: str) -> str | None:
    value = said.get(name)
    if value is not None and not (isinstance(value, str) and _HEX.fullmatch(value)):
        raise ValueError(f"{name} must be 32 hexadecimal digits, not {value!r}")
    return value
