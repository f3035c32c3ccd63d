"""Start ranks as processes and collect what they leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


@dataclass
class Ended:
    """How one rank ended; ``seconds`` after the start of all."""

    code: int
    output: str
    errors: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    single = ROOT / "tests" / "single_card_tests"
    paths = os.pathsep.join(map(str, (ROOT, HERE, single, single / "weights")))
    fixed = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    return os.environ | fixed | more


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(count: int, *arguments: str, limit: float = 120, script: str = "jobs.py") -> list[Ended]:
    """Run ``python SCRIPT ARGUMENTS`` in ``count`` processes, as paddle.distributed.launch sets them up."""
    endpoints = ",".join(f"127.0.0.1:{free_port()}" for _ in range(count))
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(
                PADDLE_TRAINER_ID=str(rank), PADDLE_TRAINERS_NUM=str(count), PADDLE_TRAINER_ENDPOINTS=endpoints
            ),
        )
        for rank in range(count)
    ]
    ended: list[Ended | None] = [None] * count
    try:
        while None in ended and time.monotonic() - started < limit:
            time.sleep(0.2)
            for rank, process in enumerate(processes):
                if ended[rank] is None and process.poll() is not None:
                    output, errors = process.communicate()
                    ended[rank] = Ended(process.returncode, output, errors, time.monotonic() - started)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert None not in ended, f"ranks {[r for r, e in enumerate(ended) if e is None]} still ran after {limit} s"
    return ended
