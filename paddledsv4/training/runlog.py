"""What a training run leaves behind: one JSON line per step and a picture of its loss curves."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult


def step_record(result: StepResult) -> dict[str, Any]:
    """The log line of one step: means over its microbatches, and each microbatch's own losses.

    A loss that is not finite is written as a text ("nan"), since JSON has no number for it; ``mtp`` is null
    without MTP layers, and ``evaluation`` is there after steps that were evaluated.
    """
    main = [loss.main for loss in result.losses]
    mtp = [loss.mtp for loss in result.losses if loss.mtp is not None]
    return {
        "step": result.step,
        "main": _number(sum(main) / len(main)),
        "mtp": _number(sum(mtp) / len(mtp)) if mtp else None,
        "microbatches": [
            {
                "microbatch": loss.microbatch,
                "rank": loss.rank,
                "main": _number(loss.main),
                "mtp": None if loss.mtp is None else _number(loss.mtp),
            }
            for loss in result.losses
        ],
        "grad_norm": _number(result.grad_norm),
        "lr": result.learning_rate,
        "tokens_per_second": round(result.tokens / result.seconds, 1),
    } | ({} if result.evaluation is None else {"evaluation": _number(result.evaluation)})


class RunLog:
    """``train.jsonl`` (a header, then a line per step, flushed at once) and ``loss.png`` in one folder.

    ``resumed``: the step that the run goes on after. The lines up to it stay if the folder has them, the header's
    ``resumed_at`` lists all such steps, and what an interrupted run wrote beyond it is dropped.
    """

    def __init__(self, folder: Path, header: dict[str, Any], resumed: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.picture = folder / "train.jsonl", folder / "loss.png"
        self.records: list[dict[str, Any]] = []
        if resumed is not None:
            earlier, records = read_log(self.path)
            self.records = [record for record in records if record["step"] <= resumed]
            header = header | {"resumed_at": [*earlier.get("resumed_at", []), resumed]}
        fresh = self.path.with_suffix(".part")
        self._file = fresh.open("w", encoding="utf-8")
        for line in ({"run": header}, *self.records):
            self._write(line)
        fresh.replace(self.path)

    def write(self, result: StepResult) -> dict[str, Any]:
        """Append one step and return its record."""
        self.records.append(step_record(result))
        self._write(self.records[-1])
        return self.records[-1]

    def close(self) -> None:
        """Close the log and draw the picture, if there is a step to draw."""
        self._file.close()
        if self.records:
            draw_losses(self.records, self.picture)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a log; nothing if there is none, up to the first line that is not whole otherwise."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    header, *records = lines or [{}]
    return header.get("run", {}), records


def draw_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Main, MTP and held-out loss over steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and only the end of a run needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label in (("main", "main loss"), ("mtp", "MTP loss"), ("evaluation", "held-out loss")):
        points = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                linewidth=1.2,
                marker="." if len(points) < 3 or key == "evaluation" else None,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
