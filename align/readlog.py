"""Open a log of any format that align knows and stream it: linear time, a block in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from align.issues import Issues
from align.losslog import LossLog
from align.rawlog import AUTO, MAIN_FIRST, MTP_FIRST, RawLog
from align.readjson import read_json_lines
from align.readtext import read_text_lines
from paddledsv4.errors import UserError

BLOCK = 1 << 19
LONGEST_LINE = 1 << 24

Read = tuple[LossLog, Issues]


def read_log(path: str | Path, name: str | None = None) -> RawLog:
    """Read a log: JSON lines when its first line that is not blank is a JSON object or its name ends in
    ``.jsonl``, otherwise text.

    Args:
        path: the file.
        name: how messages call it; the path by default.

    Raises:
        UserError: the file cannot be read, or is no log.
    """
    path = Path(path)
    raw = RawLog(name or str(path))
    reader = None
    try:
        with open(path, "rb") as file:
            for block, first_line, last in _blocks(file, path):
                if reader is None and (block.strip() or last):
                    as_json = path.suffix == ".jsonl" or _is_object(block.lstrip().split(b"\n", 1)[0])
                    reader = read_json_lines if as_json else read_text_lines
                if reader:
                    reader(raw, block, first_line, last)
    except FileNotFoundError:
        raise UserError(f"there is no log {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    raw.settle()
    return raw


def read_pair(
    reference: str | Path,
    candidate: str | Path,
    microbatches: int | None = None,
    reference_order: str = AUTO,
    candidate_order: str = AUTO,
) -> tuple[Read, Read]:
    """Read two logs that describe one run, each helping to place the positional lines of the other.

    When neither says more than positions, the orders of ``final_loss:`` lines follow the convention of the
    trainers (Megatron, the reference, prints MTP then main; Paddle, the candidate, main then MTP) if the
    losses fit it better than one common order, which is then taken as main-first.

    Raises:
        UserError: a file cannot be read.
    """
    one, other = read_log(reference), read_log(candidate)
    notes = []
    if reference_order == candidate_order == AUTO and _only_final(one) and _only_final(other):
        reference_order, candidate_order = _conventional_orders(one, other)
        notes.append(
            f"nothing names the kind of a final_loss line: reading the reference {reference_order}, "
            f"the candidate {candidate_order} (--ref-order, --cand-order)"
        )
    if one.positional and (not other.positional or (reference_order == AUTO and candidate_order != AUTO)):
        known = other.resolve(candidate_order, microbatches)
        read = one.resolve(reference_order, microbatches, known[0]), known
    else:
        known = one.resolve(reference_order, microbatches)
        read = known, other.resolve(candidate_order, microbatches, known[0])
    read[0][0].notes.extend(notes)
    return read


def _only_final(raw: RawLog) -> bool:
    return bool(raw.final) and not (raw.main_path or raw.mtp_path or len(raw.main) or len(raw.mtp))


def _conventional_orders(reference: RawLog, candidate: RawLog) -> tuple[str, str]:
    megatron = reference.head().resolve(MTP_FIRST)[0]
    if candidate.head().detect(1, megatron) == MAIN_FIRST:
        return MTP_FIRST, MAIN_FIRST
    return MAIN_FIRST, MAIN_FIRST


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _blocks(file, path: Path) -> Iterator[tuple[bytes, int, bool]]:
    """(block of whole lines, number of its first line, is it the last) until the end of the file."""
    rest, line = b"", 1
    while True:
        data = file.read(BLOCK)
        if not data:
            yield rest, line, True
            return
        end = data.rfind(b"\n") + 1
        if not end:
            rest += data
            if len(rest) > LONGEST_LINE:
                raise UserError(f"{path} has a line of more than {LONGEST_LINE >> 20} MB; this is no log")
            continue
        block = rest + data[:end]
        rest = data[end:]
        yield block, line, False
        line += int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))  # faster than bytes.count
