"""Training checkpoints beside plain safetensors on the same bytes, and what a save costs a training step.

Everything takes turns in one process: a plain write and a plain read of the whole state with safetensors (and fsync,
as a checkpoint does), saving and resuming, then steps without a save, with one, and with one in the background. The
best turn counts, since whatever else runs on the machine only adds. Files are read from the page cache on both sides.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddledsv4.host import prepare_host

prepare_host()

import numpy as np  # noqa: E402
import typer  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from benchmarks.setup import VOCABULARY, Setup, model_dict  # noqa: E402
from benchmarks.tell import run, tell  # noqa: E402
from paddledsv4.config import CheckpointConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from paddledsv4.distributed.group import ALONE  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.training.checkpoint.directory import sync  # noqa: E402
from paddledsv4.training.checkpoint.resume import resume  # noqa: E402
from paddledsv4.training.checkpoint.save import Checkpoints  # noqa: E402
from paddledsv4.training.checkpoint.state import host_array, state  # noqa: E402
from paddledsv4.training.trainer import Trainer  # noqa: E402

EXAMPLES = """Examples:

    python benchmarks/checkpoint.py

    python benchmarks/checkpoint.py --hidden 1024 --repeat 3 --folder /mnt/disk --json checkpoint.json
"""


def trainer(hidden: int, sequence: int) -> Trainer:
    """The model of benchmarks/step.py, after one step."""
    train = TrainConfig(sequence_length=sequence, micro_batch_size=1, steps=10**6, optimizer=OptimizerConfig(lr=1e-3))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (64, sequence + 1))
    model = ModelConfig.from_dict(model_dict(Setup("paddledsv4", hidden, sequence, 1, losses=True)))
    made = Trainer(model, train, Policy.preset(), tokens)
    next(made.train(1))
    return made


def seconds(action: Callable[[], object]) -> np.ndarray:
    """By the clock on the wall, and of this process's threads on all cores."""
    start = time.perf_counter(), time.process_time()
    action()
    return np.subtract((time.perf_counter(), time.process_time()), start)


class Turns:
    """Everything that is measured, each a method, on one trainer."""

    def __init__(self, runner: Trainer, folder: Path):
        self.runner, self.folder, self.plain = runner, folder, folder / "plain.safetensors"
        config = CheckpointConfig(dir=str(folder / "run"), save_interval=1, save_retain_interval=10**6)
        self.checkpoints = Checkpoints(config, ALONE)
        self.arrays = {piece.name: host_array(tensor) for piece, tensor in state(runner)}
        self.tensors = {piece.name: tensor for piece, tensor in state(runner)}
        self.bytes = sum(array.nbytes for array in self.arrays.values())
        self.results, self.saves = runner.train(10**6), 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            next(self.results)

    def save(self, background: bool = False) -> None:
        step, self.saves = self.runner.optimizer.step_count, self.saves + 1
        self.runner.optimizer.step_count = 10**6 + self.saves  # a new name for every save
        self.checkpoints.save(self.runner, background)
        self.runner.optimizer.step_count = step

    def plain_write(self) -> None:
        save_file(self.arrays, self.plain)
        sync(self.plain)

    def plain_read(self) -> None:
        for name, array in load_file(self.plain).items():
            self.tensors[name].set_value(array)

    def load(self) -> None:
        step = self.runner.optimizer.step_count
        resume(self.runner, self.folder / "run")
        self.runner.optimizer.step_count = step

    def stalled(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a save in the background: the copy, for which the loop stands still, and that and ``count`` steps."""
        copy = seconds(lambda: self.save(background=True))
        total = copy + seconds(lambda: self.steps(count))
        self.checkpoints.wait()
        return copy, total


def main(
    hidden: Annotated[int, typer.Option(min=64, help="Width of the model.")] = 512,
    sequence: Annotated[int, typer.Option(min=128, help="Tokens in a step.")] = 256,
    repeat: Annotated[int, typer.Option(min=1, help="Turns; the best count.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where to write; the system's temporary folder.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        figures = measure(turns := Turns(trainer(hidden, sequence), Path(name)), repeat)
    size, table = turns.bytes / 1e6, Table("what", "seconds", "CPU seconds", "MB/s", "seconds, ours / plain")
    plain = {"save": "plain write", "resume": "plain read"}
    for what, (wall, cpu) in figures.items():
        speed = f"{size / wall:.0f}" if what in plain or what in plain.values() else ""
        ratio = f"{wall / figures[plain[what]][0]:.2f}" if what in plain else ""
        table.add_row(what, f"{wall:.3f}", f"{cpu:.3f}", speed, ratio, end_section=what == "resume")
    table.title = f"State of {size:.0f} MB ({size / 12:.1f} M parameters, fp32), best of {repeat} turns"
    tell(table, [{"what": what, "seconds": wall, "cpu_seconds": cpu} for what, (wall, cpu) in figures.items()], out)


def measure(turns: Turns, repeat: int) -> dict[str, list[float]]:
    """The best seconds and CPU seconds of everything."""
    actions = {"plain write": turns.plain_write, "save": turns.save, "plain read": turns.plain_read,
               "resume": turns.load}  # fmt: skip
    found: dict[str, list[np.ndarray]] = {name: [] for name in actions}
    for _ in range(repeat + 1):
        for name, action in actions.items():
            found[name].append(seconds(action))
    best = {name: np.min(times[1:], 0) for name, times in found.items()}
    step = seconds(lambda: turns.steps(3))[0] / 3
    count = max(2, math.ceil(2 * best["save"][0] / step))  # enough for the thread to come to its end
    rows = [(seconds(lambda: turns.steps(count)), *turns.stalled(count)) for _ in range(repeat)]
    free, copy, total = (np.min(times, 0) for times in zip(*rows, strict=True))
    best |= {"step": free / count, "background save: copy": copy, "copy and longer steps": total - free}
    return {name: times.tolist() for name, times in best.items()}


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
