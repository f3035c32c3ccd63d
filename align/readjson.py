"""JSON-lines logs: the format of a bundle's losses.jsonl and of what ``align run`` writes.

A block of lines that all look as our writer prints them goes through one regular expression (about two
microseconds a line); any other block goes line by line through the JSON parser, which accepts every spelling
and explains what it refuses.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable
from itertools import compress
from typing import Any

import numpy as np

from align.losslog import NO_MD5, pack, parse_number
from align.rawlog import RawLog

_VALUE = rb'"([-+.0-9a-z]{1,400})"'
_MD5 = rb'"([0-9a-f]{32})"'
_PLAIN = re.compile(
    rb'^\{"step": ([1-9]\d{0,8}), (?:'
    rb'"microbatch": (\d{1,4}), "rank": (\d{1,4}), '
    rb'"main_loss": '
    + _VALUE
    + rb', "main_md5": '
    + _MD5
    + rb', "mtp_loss": '
    + _VALUE
    + rb', "mtp_md5": '
    + _MD5
    + rb'|"grad_norm": '
    + _VALUE
    + rb")\}\n",
    re.MULTILINE,
)
_HEX = re.compile(r"[0-9a-f]{32}")


def read_json_lines(raw: RawLog, block: bytes, first_line: int, last: bool) -> None:
    """Add a block of whole lines to ``raw``; ``first_line`` is the number of its first line.

    Lines that say nothing we know become issues. ``last`` says that the block ends the file.
    """
    if _read_plain(raw, block, first_line):
        return
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


def _read_plain(raw: RawLog, block: bytes, first_line: int) -> bool:
    """Read the block if every line of it is plain; otherwise leave ``raw`` untouched and return False."""
    rows = _PLAIN.findall(block)
    if not rows or len(rows) != block.count(b"\n") or not block.endswith(b"\n"):
        return False
    steps, is_entry, ranks, main, main_md5s, mtp, mtp_md5s, norms = zip(*rows, strict=True)
    lines = range(first_line, first_line + len(rows))
    try:
        main, mtp, norms = _floats(main), _floats(mtp), _floats(norms)
    except ValueError:
        return False
    if main:
        steps_here, microbatches = _int64(compress(steps, is_entry)), _int64(filter(None, is_entry))
        keys = steps_here << 32 | microbatches << 16 | _int64(filter(None, ranks))
        lines_here = array("I", compress(lines, is_entry))
        raw.main.extend(keys, main, _raw(main_md5s), lines_here)
        raw.mtp.extend(keys, mtp, _raw(mtp_md5s), lines_here)
    if norms:
        is_norm = [not entry for entry in is_entry]
        raw.grad_norms.extend(
            _int64(compress(steps, is_norm)) << 32,
            norms,
            bytes(16 * len(norms)),
            array("I", compress(lines, is_norm)),
        )
    return True


def _int64(texts: Iterable[bytes]) -> np.ndarray:
    return np.fromiter(map(int, texts), np.int64)


def _floats(texts: tuple[bytes, ...]) -> array:
    """The numbers of the texts that are not empty."""
    return array("d", map(float, filter(None, texts)))


def _raw(md5s: tuple[bytes, ...]) -> bytes:
    return bytes.fromhex(b"".join(md5s).decode("ascii"))


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
