"""A run that is killed again and again ends as one that never was: the same losses and weights, bit for bit.

Two runs of one recipe: one undisturbed, one killed at random moments, by SIGKILL and by SIGTERM, while it starts,
computes or saves, and resumed each time with ``paddledsv4 resume DIR``. Afterwards every line of the log (but for
tokens per second) and every byte of the last checkpoint must be equal, and the memory of the undisturbed run must not
have grown by more than 2 % since step 100. The exit code is 1 if anything differs.

The model is that of configs/tiny.yaml; batches are one row of 64 tokens, so that 2,000 steps take about 12 minutes of
one core of an AMD EPYC, each run. ``--together`` runs both at once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
import yaml
from rich.table import Table

from benchmarks.tell import run, tell
from paddledsv4.config.files import read_mapping
from paddledsv4.host import BITWISE_ENVIRONMENT
from paddledsv4.training.checkpoint.directory import RECORD, Directory
from paddledsv4.training.checkpoint.record import digest

EXAMPLES = """Examples:

    python benchmarks/soak.py

    python benchmarks/soak.py --steps 200 --kills 6 --folder runs/short-soak
"""
ROOT = Path(__file__).resolve().parents[1]
SHORTER = {"sequence_length": 64, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
SETTLED, GROWTH = 100, 0.02  # the step whose memory counts, and what it may grow by
LATE = 60, 10  # seconds for a start, and for a step: a process that needs more is taken for hanging
COMMAND = [sys.executable, "-W", "ignore", "-m", "paddledsv4"]


@dataclass
class Kill:
    """``number`` is sent ``delay`` seconds after ``step`` is done; step 0 is the start of the process."""

    number: signal.Signals
    step: int
    delay: float


@dataclass
class Life:
    """One process: the steps that it did, its memory in MB after each, its exit code."""

    memory: dict[int, float] = field(default_factory=dict)
    code: int = 0


def plan(steps: int, kills: int, seed: int) -> list[Kill]:
    """Kills in the order of their steps; every eighth comes while the process starts."""
    drawn = random.Random(seed)
    at = sorted(drawn.sample(range(1, steps), kills))
    numbers = [signal.SIGKILL if i % 2 else signal.SIGTERM for i in range(kills)]
    drawn.shuffle(numbers)
    starting = set(range(4, kills, 8))
    return [
        Kill(number, 0 if i in starting else step, drawn.uniform(0, 4 if i in starting else 1.5))
        for i, (number, step) in enumerate(zip(numbers, at, strict=True))
    ]


def write_recipe(config: Path, folder: Path, steps: int, interval: int) -> Path:
    """The recipe with short rows, cut from the same tokens as one stream."""
    values = read_mapping(config)
    tokens = np.load((config.parent / values["data"]["tokens"]).resolve(), allow_pickle=False)
    np.save(folder / "tokens.npy", tokens.reshape(-1))
    values["training"] |= SHORTER | {"steps": steps}
    values["data"]["tokens"] = "tokens.npy"
    values["checkpoint"] = {
        "save_interval": interval, "save_retain_interval": 20 * interval, "async": True, "warmup_save": False
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "recipe.yaml"


def live(words: list[str], steps: int, kill: Kill | None = None) -> Life:
    """Run the command to its end, which may be one that ``kill`` brings."""
    environment = os.environ | BITWISE_ENVIRONMENT | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    life = Life()
    with subprocess.Popen([*COMMAND, *words], env=environment, stdout=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(LATE[0] + steps * LATE[1], process.kill)
        alarm.start()
        if kill and kill.step == 0:
            _send(process, kill)
            kill = None
        for line in process.stdout:
            if line.startswith("step ") and line.endswith("\n"):
                step = int(line.split()[1])
                life.memory[step] = _resident(process.pid)
                if kill and step >= kill.step:
                    _send(process, kill)
                    kill = None
        life.code = process.wait()
        alarm.cancel()
    return life


def _send(process: subprocess.Popen, kill: Kill) -> None:
    time.sleep(kill.delay)
    process.send_signal(kill.number)


def _resident(pid: int) -> float:
    """Resident memory in MB; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def disturbed(recipe: Path, folder: Path, steps: int, kills: list[Kill]) -> tuple[list[Life], list[str]]:
    """A life for every kill, and one to the end; all but the first begin with ``paddledsv4 resume``. And what is wrong
    with how they ended."""
    lives, wrong = [], []
    for number, kill in enumerate([*kills, None], 1):
        first = not (folder / "run.json").exists()
        words = ["train", "--config", str(recipe), "--run-dir", str(folder)] if first else ["resume", str(folder)]
        life = live(words, steps, kill)
        lives.append(life)
        if life.code not in (0, -kill.number if kill else 0):
            return lives, [*wrong, f"process {number} ended with {life.code}"]
        saved = Directory(folder / "checkpoints").latest()
        if life.code == 0 and life.memory and saved != max(life.memory):
            wrong.append(f"process {number} ended well after step {max(life.memory)} and saved step {saved} last")
    return lives, wrong


def log_differences(whole: Path, other: Path, steps: int) -> list[str]:
    """What is not alike in two logs, one clause each."""
    logs = [[json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[1:]]
            for folder in (whole, other)]
    found = [f"the log of {folder.name} has other steps than 1 to {steps}"
             for folder, log in zip((whole, other), logs, strict=True)
             if [record["step"] for record in log] != list(range(1, steps + 1))]
    for one, two in zip(*logs, strict=False):
        keys = [key for key in one | two if key != "tokens_per_second" and one.get(key) != two.get(key)]
        if keys:
            return [*found, f"step {one['step']} differs in {', '.join(keys)}"]
    return found


def checkpoint_differences(whole: Path, other: Path, steps: int) -> list[str]:
    """Files of the last checkpoints that are not alike; each is held against its own record too."""
    found, files = [], []
    for folder in (whole, other):
        last = Directory(folder / "checkpoints").folder(steps)
        listed = json.loads((last / RECORD).read_text())["files"]
        files.append({name: digest((last / name).read_bytes()) for name in listed})
        found += [f"{last / name} is not what was written" for name in listed if files[-1][name] != listed[name]]
    return found + [f"{name} of the last checkpoint differs" for name in files[0] | files[1]
                    if files[0].get(name) != files[1].get(name)]


def timed(function: Callable, *arguments) -> tuple:
    """What the function returns, and the seconds that it took."""
    start = time.monotonic()
    return function(*arguments), time.monotonic() - start


def growth(life: Life, settled: int) -> float:
    """By which part the memory has grown from step ``settled`` to the last but one; the last is followed at once by the
    picture of the curves, whose library takes memory."""
    return life.memory[max(life.memory) - 1] / life.memory[settled] - 1


def main(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each run.")] = 2000,
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 30,
    seed: Annotated[int, typer.Option(help="Decides when, and by which signal.")] = 0,
    interval: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 20,
    config: Annotated[Path, typer.Option(help="The recipe.")] = ROOT / "configs" / "tiny.yaml",
    folder: Annotated[Path, typer.Option(help="Where both runs go; emptied first.")] = Path("runs/soak"),
    together: Annotated[bool, typer.Option("--together", help="Both runs at once, on two cores.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder = folder.resolve()
    recipe, whole, other = write_recipe(config, folder, steps, interval), folder / "whole", folder / "killed"
    planned = plan(steps, kills, seed)
    with ThreadPoolExecutor(2 if together else 1) as runs:
        undisturbed = runs.submit(timed, live, ["train", "--config", str(recipe), "--run-dir", str(whole)], steps)
        killed = runs.submit(timed, disturbed, recipe, other, steps, planned)
        (straight, seconds), ((lives, wrong), seconds_killed) = undisturbed.result(), killed.result()
    if straight.code:
        raise SystemExit(f"the undisturbed run ended with {straight.code}")
    settled = min(SETTLED, steps // 2)
    grown = growth(straight, settled)
    problems = wrong + log_differences(whole, other, steps) + checkpoint_differences(whole, other, steps)
    if grown > GROWTH:
        problems.append(f"memory grew by {grown:.1%} since step {settled}")
    repeated = sum(len(life.memory) for life in lives) - steps
    figures = {
        "steps": steps, "kills": kills, "SIGKILL": sum(k.number == signal.SIGKILL for k in planned),
        "SIGTERM": sum(k.number == signal.SIGTERM for k in planned),
        "while starting": sum(k.step == 0 for k in planned),
        "saved by SIGTERM": sum(life.code == 0 for life in lives[:-1]), "steps done twice": repeated,
        "seconds undisturbed": round(seconds), "seconds killed": round(seconds_killed),
        f"MB at step {settled}": round(straight.memory[settled], 1),
        f"MB at step {steps - 1}": round(straight.memory[steps - 1], 1), "growth": round(grown, 5),
        "largest MB of the killed run": round(max(max(x.memory.values(), default=0) for x in lives), 1),
        "problems": problems,
    }  # fmt: skip
    table = Table("what", "figure", title=f"{steps} steps, killed {kills} times")
    for name, value in figures.items():
        table.add_row(name, str(value) if value != [] else "none: losses and weights are equal")
    tell(table, [figures], json_file)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
