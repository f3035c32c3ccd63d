"""What the finite guard and the trace of attention cost: CPU seconds of a step, modes in turn, in one process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.table import Table

from benchmarks.tell import run, tell

EXAMPLES = "python benchmarks/guard.py    python benchmarks/guard.py --numerics torch --turns 20"
MODES = {
    "off": {"check_finite": "off"},
    "--check-finite loss": {"check_finite": "loss"},
    "--check-finite full": {"check_finite": "full"},
    "--trace-attention '*'": {"check_finite": "off", "trace_attention": {"layers": "*", "steps": "1:999999999"}},
}


def measure(recipe_file: Path, numerics: str, turns: int) -> list[dict]:
    """Every mode takes ``turns`` steps of one run after one that warms up; the guard of losses is timed alone too."""
    from paddledsv4.host import prepare_host

    prepare_host()
    from paddledsv4.config import Recipe
    from paddledsv4.config.observe import ObserveConfig
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.observe.losses import LossGuard
    from paddledsv4.observe.run import observing
    from paddledsv4.training.data import load_tokens
    from paddledsv4.training.trainer import Trainer

    recipe = Recipe.from_file(recipe_file)
    training = recipe.training.replace(steps=10**9)
    tokens = load_tokens(recipe.data.tokens, training.sequence_length, recipe.model.vocab_size)
    trainer = Trainer(recipe.model, training, Policy.preset(numerics), tokens)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for mode, values in MODES.items():
                with observing(trainer, ObserveConfig.from_dict(values), Path(folder)):
                    steps = trainer.train(trainer.optimizer.step_count + 2)
                    next(steps)
                    start = time.process_time()
                    result = next(steps)
                    seconds[mode].append(time.process_time() - start)
    guard, calls = LossGuard(), 10_000
    start = time.perf_counter()
    for _ in range(calls):
        guard.end_step(result)
    alone = (time.perf_counter() - start) / calls
    off = median(seconds["off"])
    rows = [{"mode": mode, "seconds": median(s), "fastest": min(s), "share": median(s) / off - 1} for mode, s in
            seconds.items()]  # fmt: skip
    return [*rows, {"mode": "guard of losses alone", "seconds": alone, "fastest": alone, "share": alone / off}]


def table(rows: list[dict], title: str) -> Table:
    """For a terminal."""
    result = Table("mode", title=title)
    for heading in ("CPU s a step, median", "fastest", "of a step"):
        result.add_column(heading, justify="right")
    for row in rows:
        share = f"{row['share']:+.1%}" if row["mode"] in MODES else f"{row['share']:+.5%}"
        result.add_row(row["mode"], f"{row['seconds']:.6f}", f"{row['fastest']:.6f}", share)
    return result


def main(
    config: Annotated[Path, typer.Option(help="A recipe.")] = Path("configs/tiny.yaml"),
    numerics: Annotated[str, typer.Option(help="Preset.")] = "paddle",
    turns: Annotated[int, typer.Option(min=1, help="Steps measured per mode.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    rows = measure(config, numerics, turns)
    tell(table(rows, f"{config}, preset {numerics}, {turns} steps a mode"), rows, out)
    print(json.dumps({row["mode"]: round(row["share"], 6) for row in rows}))


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
