"""The time of a rival: another library's kernel on a case's inputs, in this process or in one of its own.

    python -m benchmarks.kernels_rival benchmarks.kernels_attn "sparse attention, forward, 4096" tilelang

One of its own is for what is known to hang: a kernel that never ends cannot be stopped in any other way. What was
measured until then counts, and it is said how much that was.
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

import torch

from benchmarks import kernel_timing

START, STEP = 60, 3  # seconds that such a process has until its first measurement, and for every other
ENOUGH = 5  # measurements of a rival that hung
NOT_CARRIED, LEFT_OUT = "not carried", "left out"
ABSENT = NOT_CARRIED, LEFT_OUT  # of those nothing is said; the others that have no time failed
SAMPLE = "sample "  # before what that process has to say: libraries print, too


def reason(error: BaseException) -> str:
    """The first line of an exception, for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _samples(make, graph: bool) -> Iterator[float | str]:
    try:
        run = make()
        try:
            yield from kernel_timing.samples(run, graph)
        except RuntimeError:  # it synchronises, or sets itself up again while it is captured
            torch.cuda.synchronize()
            yield from kernel_timing.samples(run, graph=False)
    except ImportError as error:
        yield f"{NOT_CARRIED} ({error.name or error})"
    except Exception as error:  # a rival that cannot do this size is a line, not the end
        yield reason(error)


def _middle(samples: list[float | str]) -> float | str:
    return samples[-1] if isinstance(samples[-1], str) else median(samples)


def peer_time(make, graph: bool) -> float | str:
    """Milliseconds of what ``make()`` returns, or in words why there are none."""
    return _middle(list(_samples(make, graph)))


def time_alone(module: str, case: str, rival: str) -> tuple[float | str, str]:
    """``peer_time`` in a process of its own, and a remark if that hung. ``module`` has the function ``cases``."""
    command = [sys.executable, "-m", __name__, module, case, rival]
    with tempfile.TemporaryFile("w+") as out:
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, stdout=out, stderr=subprocess.PIPE, text=True)
        out.seek(0)
        samples = [json.loads(line.removeprefix(SAMPLE)) for line in out if line.startswith(SAMPLE)]
    if done.returncode == 0:
        return _middle(samples), ""
    end = "hung" if "Timeout (" in done.stderr else f"ended with {done.returncode}"
    remark = f"{end} after {len(samples)} measurements"
    return (median(samples), remark) if len(samples) >= ENOUGH else (remark, "")


def main(module: str, case: str, rival: str) -> None:
    """Prints every measurement as it comes; ends when the next one takes too long."""
    faulthandler.dump_traceback_later(START, exit=True)
    found = next(found for found in importlib.import_module(module).cases(quick=False) if found.name == case)
    for sample in _samples(found.peers[rival], found.graph):
        print(SAMPLE + json.dumps(sample), flush=True)
        faulthandler.dump_traceback_later(STEP, exit=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
