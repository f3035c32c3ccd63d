"""Signals behind paddle.distributed.launch: to one rank or to the launcher, all ranks stop after one step and save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from layouts import configs
from ranks import ROOT, environment

from paddledsv4.numerics.policy import installed
from paddledsv4.training.checkpoint.directory import Directory
from paddledsv4.training.runlog import read_log

pytestmark = pytest.mark.skipif(not installed("torch"), reason="gloo needs paddledsv4[torch]")


def launch(folder: Path, *words) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--devices", "",
        "--log_dir", folder / "ranks", sys.executable, "-u", "-m", "paddledsv4", *words,
    ]
    with (folder / "launcher.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def steps(out: Path) -> list[int]:
    return [record["step"] for record in read_log(out / "train.jsonl")[1]]


def interrupted(folder: Path, out: Path, to: str, *words) -> tuple[int, list[int]]:
    """Start, wait for two more steps, send SIGTERM. Returns the launcher's exit code and the ranks' process ids."""
    before = steps(out)[-1] if (out / "train.jsonl").exists() else 0
    launcher = launch(folder, *words)
    deadline = time.monotonic() + 120
    while not ((out / "train.jsonl").exists() and (steps(out) or [0])[-1] >= before + 2):
        assert time.monotonic() < deadline and launcher.poll() is None, (folder / "launcher.log").read_text()
        time.sleep(0.1)
    ranks = children(launcher.pid)
    os.kill(launcher.pid if to == "launcher" else ranks[1], signal.SIGTERM)
    return launcher.wait(100), ranks


def test_one_rank_and_then_the_launcher(tmp_path):
    model, training = configs(gradient_accumulation_steps=1, steps=100_000)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(1).integers(0, 96, (64, 33)))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"}, "numerics": "paddle",
        "parallel": {"world_size": 2, "data": 2, "expert": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    out = tmp_path / "out"
    code, ranks = interrupted(tmp_path, out, "rank", "train", "--config", tmp_path / "recipe.yaml", "--out", out)
    assert code == 0 and not any(map(alive, ranks)) and len(ranks) == 2
    first = steps(out)[-1]
    assert Directory(out / "checkpoints").complete() == [first]
    logs = [(tmp_path / "ranks" / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert f"[rank 0] stopped by a signal to another rank after step {first} of 100000" in logs[0]
    assert "[rank 1] SIGTERM: stopping after this step" in logs[1]
    assert all(line.startswith("[rank 0] ") for line in logs[0].splitlines() if "step " in line)

    code, ranks = interrupted(tmp_path, out, "launcher", "resume", out)
    assert code == signal.SIGTERM and not any(map(alive, ranks))  # the launcher's own exit code
    assert steps(out) == list(range(1, steps(out)[-1] + 1))
    assert Directory(out / "checkpoints").complete() == [first, steps(out)[-1]]
    assert "[rank 0] stopped by SIGTERM" in (tmp_path / "ranks" / "workerlog.0").read_text()
