"""Start the ranks of a bundle with paddle.distributed.launch, and make one error of theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.errors import UserError

if TYPE_CHECKING:
    from align.run import RunRequest

# What ranks say that suffer from another rank's end.
ECHOES = ("stopped because another rank did", "lost a rank", "told to stop")


def launch_ranks(request: RunRequest, ranks: int, log: Path) -> None:
    """Train in ``ranks`` processes of this machine; the first one writes ``log``.

    What rank i prints goes to ``workerlog.i`` in the folder ``ranks`` beside the log; rank 0's progress to stderr.

    Raises:
        UserError: a rank failed, so that no log was written; it says which rank, and why.
    """
    folder = log.parent / "ranks"
    before = _version(log)
    command = [
        sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks),
        "--devices", "", "--log_dir", str(folder), "--job_id", "align", sys.executable, "-W", "ignore",
        "-m", "align", *arguments(request, log.parent),
    ]
    environment = os.environ | {"PADDLE_DISTRI_BACKEND": "gloo", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as launcher:
        failed = None
        for line in launcher.stdout:
            if line.startswith("step "):
                print(line, end="", file=sys.stderr, flush=True)
            failed = failed or re.match(r"Container rank (\d+) status failed .* code (-?\d+)", line)
    if _version(log) == before:
        silent = f"rank {failed[1]} ended with code {failed[2]}" if failed else "a rank ended"
        raise UserError(_what_went_wrong(folder, ranks, f"{silent} and without a word"))


def arguments(request: RunRequest, out: Path) -> list[str]:
    """The command line of one rank."""
    choices = {"--numerics": request.numerics, "--precision": request.precision, "--steps": request.steps}
    overrides = request.overrides
    return [
        "run", request.bundle, "--out", str(out),
        *(text for option, value in choices.items() if value is not None for text in (option, str(value))),
        *(text for op, variant in overrides.ops.items() for text in ("--op", f"{op}={variant}")),
        *(text for rule in overrides.layers for text in ("--layer-op", str(rule))),
    ]


def _version(path: Path) -> tuple[int, int] | None:
    """Tells one file at ``path`` from the next."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _what_went_wrong(folder: Path, ranks: int, silent: str) -> str:
    """The error that matters among those in the ranks' logs; ``silent`` if none gives a cause."""
    said = []
    for rank in range(ranks):
        path = folder / f"workerlog.{rank}"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        said += [line.removeprefix("error: ") for line in lines if line.startswith("error: ")][-1:]
        if any(line.startswith("Traceback") for line in lines):
            return f"rank {rank} ended with a bug; its trace is in {path}"
    causes = [line for line in said if not any(echo in line for echo in ECHOES)] or [silent]
    return f"{causes[0]} (logs of the ranks: {folder})"
