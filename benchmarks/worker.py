"""An engine in a process of its own, told over a pipe when to step, so that engines alternate and memory is apart."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.setup import Setup

ROOT = Path(__file__).resolve().parents[1]


def peak_megabytes() -> float:
    """Peak resident memory of this process (of its own image: a spawned child inherits its parent's ru_maxrss)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def serve(setup: Setup) -> None:
    """The child: build the engine, then answer every step number on stdin with one line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    from benchmarks.peers import ENGINES

    engine = ENGINES[setup.engine](setup)
    answer = {"parameters": int(engine.parameters), "peak_mb": peak_megabytes()}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = engine.step(int(line))
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        print(json.dumps(answer | {"peak_mb": peak_megabytes()}), file=answers, flush=True)


class Worker:
    """The parent's handle: started on creation, ready after :meth:`wait`."""

    def __init__(self, setup: Setup):
        self.setup = setup
        threads = {f"{library}_NUM_THREADS": str(setup.threads) for library in ("OMP", "MKL", "OPENBLAS")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.step", "--worker", json.dumps(setup.as_dict())],
            cwd=ROOT, env=os.environ | threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            text = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(f"{self.setup.label} stopped: {text[-1] if text else 'no message'}")
        return json.loads(line)

    def wait(self) -> dict:
        """The number of parameters and the memory before the first step."""
        return self._answer()

    def step(self, number: int) -> dict:
        """Run one step; seconds, loss and the peak so far."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
