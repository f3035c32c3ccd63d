"""Start ranks as processes of this machine, as paddle.distributed.launch would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(count: int, arguments: list[str]) -> None:
    """Run ``benchmarks/parallel_rank.py`` in ``count`` processes and wait for all.

    Raises:
        RuntimeError: a rank failed; it quotes the last line that rank wrote.
    """
    endpoints = ",".join(f"127.0.0.1:{_free_port()}" for _ in range(count))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.parallel_rank", *arguments],
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {
                "PADDLE_TRAINER_ID": str(rank), "PADDLE_TRAINERS_NUM": str(count),
                "PADDLE_TRAINER_ENDPOINTS": endpoints, "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(count)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in processes]
    for rank, (process, text) in enumerate(zip(processes, errors, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank}: {(text.strip().splitlines() or ['no message'])[-1]}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
