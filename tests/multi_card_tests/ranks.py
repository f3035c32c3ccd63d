"""Start ranks as processes and collect what they leave."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["paddle", "torch", "paddledsv4.training.trainer"])


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


def _rank(script: Path, arguments: tuple[str, ...], settings: dict[str, str], files: Path) -> None:
    """What a process does: as if it were started with ``settings`` as its environment and wrote to FILES.1 and .2."""
    os.environ.clear()
    os.environ.update(settings)
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(f"{files}.{stream}", os.O_WRONLY), stream)
    sys.path[:0] = settings["PYTHONPATH"].split(os.pathsep)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _start(script: Path, arguments: tuple[str, ...], settings: dict[str, str], files: Path) -> BaseProcess:
    with mock.patch.dict(os.environ, settings):
        forkserver.ensure_running()
    process = SERVER.Process(target=_rank, args=(script, arguments, settings, files))
    process.start()
    return process


def run_ranks(count: int, *arguments: str, limit: float = 120, script: str = "jobs.py") -> list[Ended]:
    """Run ``SCRIPT ARGUMENTS`` in ``count`` processes, as paddle.distributed.launch sets them up.

    They are forked from one that has imported what takes seconds; tests of the launcher start theirs from nothing.
    """
    endpoints = ",".join(f"127.0.0.1:{free_port()}" for _ in range(count))
    started = time.monotonic()
    ended: list[Ended | None] = [None] * count
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(count)]
        for file in files:
            Path(f"{file}.1").touch()
            Path(f"{file}.2").touch()
        processes = [
            _start(HERE / script, tuple(map(str, arguments)), environment(
                PADDLE_TRAINER_ID=str(rank), PADDLE_TRAINERS_NUM=str(count), PADDLE_TRAINER_ENDPOINTS=endpoints
            ), files[rank])
            for rank in range(count)
        ]  # fmt: skip
        try:
            while None in ended and time.monotonic() - started < limit:
                time.sleep(0.2)
                for rank, process in enumerate(processes):
                    if ended[rank] is None and process.exitcode is not None:
                        output, errors = (Path(f"{files[rank]}.{stream}").read_text() for stream in (1, 2))
                        ended[rank] = Ended(process.exitcode, output, errors, time.monotonic() - started)
        finally:
            for process in processes:
                process.kill()
                process.join()
    assert None not in ended, f"ranks {[r for r, e in enumerate(ended) if e is None]} still ran after {limit} s"
    return ended
