"""The time of a rival: another library's kernel on a case's inputs, in this process or in one of its own.

    python -m benchmarks.kernels_rival benchmarks.kernels_attn "sparse attention, forward, 4096" tilelang

One of its own is for what is known to hang: a kernel that never ends cannot be stopped in any other way.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import kernel_timing

SECONDS = 45  # for a process of its own, which makes the inputs once more


def reason(error: BaseException) -> str:
    """The first line of an exception, for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def peer_time(make, graph: bool) -> float | str:
    """Milliseconds of what ``make()`` returns, or in words why there are none."""
    try:
        run = make()
        try:
            return kernel_timing.milliseconds(run, graph)
        except RuntimeError:  # it synchronises, or sets itself up again while it is captured
            torch.cuda.synchronize()
            return kernel_timing.milliseconds(run, graph=False)
    except ImportError as error:
        return f"not carried ({error.name or error})"
    except Exception as error:  # a rival that cannot do this size is a line, not the end
        return reason(error)


def time_alone(module: str, case: str, rival: str) -> float | str:
    """``peer_time`` in a process of its own, which ends after SECONDS. ``module`` has the function ``cases``."""
    command = [sys.executable, "-m", __name__, module, case, rival]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} s"
    if done.returncode:
        return f"ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:160]}"
    return json.loads(done.stdout.splitlines()[-1])


def main(module: str, case: str, rival: str) -> None:
    """Prints, as JSON in the last line, what ``peer_time`` says."""
    found = next(found for found in importlib.import_module(module).cases(quick=False) if found.name == case)
    print(json.dumps(peer_time(found.peers[rival], found.graph)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
