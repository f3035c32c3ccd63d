"""What observing costs: CPU seconds of steps with metrics, and with the profiler, beside steps without.

One run per kind, whose steps are observed in turns, so that both kinds of step meet the same machine and the same
state; the fastest of each count. CPU seconds, as other processes share the cores. A trace is written after its step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddledsv4.host import prepare_host

prepare_host()

import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.tell import run, tell  # noqa: E402
from paddledsv4.config import Recipe  # noqa: E402
from paddledsv4.config.profile import ProfileConfig  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.observe.metrics import collect  # noqa: E402
from paddledsv4.observe.profile.record import ProfileRecorder, profile_path  # noqa: E402
from paddledsv4.observe.steps import StepObserver  # noqa: E402
from paddledsv4.training.data import load_tokens  # noqa: E402
from paddledsv4.training.trainer import Trainer  # noqa: E402

EXAMPLES = """Examples:

    python benchmarks/observing.py

    python benchmarks/observing.py --numerics torch --turns 3
"""
ROOT = Path(__file__).resolve().parents[1]


class Turns(StepObserver):
    """Every other step, from the second on, is observed by what ``make`` gives for it; it is closed after the step."""

    def __init__(self, make):
        self.make, self.observer = make, None

    def begin_step(self, step: int) -> None:
        self.observer = self.make(step) if step % 2 == 0 else None
        if self.observer:
            self.observer.begin_step(step)

    def begin_microbatch(self, index: int) -> None:
        if self.observer:
            self.observer.begin_microbatch(index)

    def end_step(self, result) -> None:
        if self.observer:
            self.observer.end_step(result)


class Profile(ProfileRecorder):
    """Tells what writing the trace took."""

    def close(self) -> None:
        start = time.process_time()
        super().close()
        self.writing = time.process_time() - start


def seconds(recipe: Recipe, preset: str, make, turns: int) -> tuple[float, float, float]:
    """The fastest step without and with what ``make(trainer, step)`` observes, and what is written after it."""
    tokens = load_tokens(recipe.data.tokens, recipe.training.sequence_length, recipe.model.vocab_size)
    trainer = Trainer(recipe.model, recipe.training, Policy.preset(preset), tokens)
    observing = Turns(lambda step: make(trainer, step))
    trainer.observers.append(observing)
    taken: tuple[list[float], ...] = [], [], []
    start = time.process_time()
    for result in trainer.train(2 * turns + 2):
        now = time.process_time()
        if result.step > 2:  # the first ones warm up
            writing = getattr(observing.observer, "writing", 0.0)
            taken[result.step % 2 == 0].append(now - start - writing)
            taken[2].append(writing)
        start = time.process_time()
    return min(taken[0]), min(taken[1]), max(taken[2])


def kinds(folder: Path) -> dict:
    """What is measured -> trainer, step -> observer."""

    def gauges(*chosen):
        def make(trainer, step):
            collector = collect.Collector(trainer, 1)
            collector.gauges = [gauge for gauge in collector.gauges if not chosen or type(gauge).__name__ in chosen]
            return collector

        return make

    def profile(trainer, step):
        return Profile(trainer, ProfileConfig(steps=str(step)), profile_path(folder, 0))

    return {"all metrics": gauges(), "of them sink share and recall": gauges("AttentionShares"), "profiler": profile}


def main(
    config: Annotated[Path, typer.Option(help="A recipe.")] = ROOT / "configs" / "tiny.yaml",
    numerics: Annotated[str, typer.Option(help="A preset.")] = "paddle",
    turns: Annotated[int, typer.Option(min=1, help="Observed steps of each kind; the fastest counts.")] = 8,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    table, figures = Table("observed", "CPU s a step, without", "with", "more", "written after it"), []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in kinds(Path(folder)).items():
            without, observed, writing = seconds(Recipe.from_file(config), numerics, make, turns)
            table.add_row(name, f"{without:.3f}", f"{observed:.3f}", f"{observed / without - 1:+.1%}", f"{writing:.3f}")
            figures.append({"observed": name, "without": without, "with": observed, "writing": writing})
    tell(table, figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
