"""The time of a rival: another library's kernel on a case's inputs, in this process or in one of its own.

    python -m benchmarks.kernels_rival benchmarks.kernels_attn "sparse attention, forward, 4096" tilelang

One of its own is for what is known to hang: a kernel that never ends cannot be stopped in any other way. What was
measured until then counts, and it is said how much that was. There our kernel is measured, too, in turn with the rival:
the chip is as hot for both.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import kernel_timing

START, FIRST, STEP = 45, 15, 4  # seconds such a process has until both can run, for the first measurement of both, and
# for every other
ENOUGH, TRIES = 5, 3  # measurements of a rival that hangs, and processes that may add to them
NOT_CARRIED, LEFT_OUT = "not carried", "left out"
ABSENT = NOT_CARRIED, LEFT_OUT  # of those nothing is said; the others that have no time failed
SAMPLE = "sample "  # before what that process has to say: libraries print, too


def reason(error: BaseException) -> str:
    """The first line of an exception, for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _samples(graph: bool, *makes) -> Iterator[list[float] | str]:
    """Times of what ``makes`` return, measured in turn; or in words why there are none."""
    try:
        runs = [make() for make in makes]
        try:
            yield from map(list, zip(*(kernel_timing.samples(run, graph) for run in runs), strict=False))
        except RuntimeError:  # it synchronises, or sets itself up again while it is captured
            torch.cuda.synchronize()
            yield from map(list, zip(*(kernel_timing.samples(run, graph=False) for run in runs), strict=False))
    except ImportError as error:
        yield f"{NOT_CARRIED} ({error.name or error})"
    except Exception as error:  # a rival that cannot do this size is a line, not the end
        yield reason(error)


def peer_time(make, graph: bool) -> float | str:
    """Milliseconds of what ``make()`` returns, or in words why there are none."""
    found = list(_samples(graph, make))
    return found[-1] if isinstance(found[-1], str) else median(time for (time,) in found)


class Alone(NamedTuple):
    """What a process of its own found: milliseconds or why there are none, ours beside it, and a remark if it hung."""

    theirs: float | str
    ours: float | None = None
    remark: str = ""


def time_alone(module: str, case: str, rival: str) -> Alone:
    """A rival's time and ours in a process of their own. ``module`` has the function ``cases``."""
    pairs, hung = [], 0
    for _ in range(TRIES):
        code, errors, said = _process([sys.executable, "-m", __name__, module, case, rival])
        if code == 0 and isinstance(said[-1], str):
            return Alone(said[-1])
        pairs += [pair for pair in said if isinstance(pair, list)]
        if "Timeout (" not in errors:
            break
        hung += 1
        if len(pairs) >= ENOUGH:
            break
    remark = f"hung{f' {hung} times' if hung > 1 else ''}, {len(pairs)} measurements" if hung else ""
    if code and not hung:
        remark = f"ended with {code} after {len(pairs)} measurements"
    if code and len(pairs) < ENOUGH:
        return Alone(remark)
    return Alone(median(theirs for _, theirs in pairs), median(ours for ours, _ in pairs), remark)


def _process(command: list[str]) -> tuple[int, str, list[list[float] | str]]:
    """Exit status, what went to stderr, and the samples."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryFile("w+") as out:
        done = subprocess.run(command, cwd=root, stdout=out, stderr=subprocess.PIPE, text=True)
        out.seek(0)
        said = [json.loads(line.removeprefix(SAMPLE)) for line in out if line.startswith(SAMPLE)]
    return done.returncode, done.stderr, said


def main(module: str, case: str, rival: str) -> None:
    """Prints every measurement as it comes; ends when the next one takes too long."""
    faulthandler.dump_traceback_later(START, exit=True)
    found = next(found for found in importlib.import_module(module).cases(quick=False) if found.name == case)

    def theirs():
        run = found.peers[rival]()
        faulthandler.dump_traceback_later(FIRST, exit=True)
        return run

    for sample in _samples(found.graph, lambda: found.ours, theirs):
        print(SAMPLE + json.dumps(sample), flush=True)
        faulthandler.dump_traceback_later(STEP, exit=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
