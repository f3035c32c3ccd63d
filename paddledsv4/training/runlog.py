"""What a training run leaves behind: one JSON line per step and a picture of its loss curves."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddledsv4.errors import UserError

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
    ``resumed_at`` lists all such steps, and what an interrupted run wrote beyond it is dropped. A line that a kill cut
    is never taken for a step. Nothing is kept in memory but the ``last`` record.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, header: dict[str, Any], resumed: int | None = None):
        self.path, self.picture = folder / "train.jsonl", folder / "loss.png"
        self.last: dict[str, Any] | None = None
        lines = _whole_lines(self.path) if resumed is not None else iter(())
        if resumed is not None:
            header = header | {"resumed_at": [*next(lines, {}).get("run", {}).get("resumed_at", []), resumed]}
        fresh = self.path.with_suffix(".part")
        with self._writable():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = fresh.open("w", encoding="utf-8")
        self._write({"run": header})
        for record in lines:
            if (self.last or {"step": 0})["step"] < record["step"] <= resumed:
                self._keep(record)
        with self._writable():
            fresh.replace(self.path)

    def write(self, result: StepResult) -> dict[str, Any]:
        """Append one step and return its record."""
        self._keep(step_record(result))
        return self.last

    def close(self) -> None:
        """Close the log and draw the picture, if there is a step to draw."""
        self._file.close()
        if self.last:
            draw_losses(read_log(self.path)[1], self.picture)

    def _keep(self, record: dict[str, Any]) -> None:
        self._write(record)
        self.last = record

    def _write(self, line: dict[str, Any]) -> None:
        with self._writable():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a log; nothing if there is none, up to the first line that is not whole otherwise."""
    lines = _whole_lines(path)
    return next(lines, {}).get("run", {}), list(lines)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The header, then the records, as far as they are whole: none, if there is no log or its header is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            values = json.loads(line)
            key, kind = ("step", int) if number else ("run", dict)
            if not (line.endswith("\n") and isinstance(values, dict) and isinstance(values.get(key), kind)):
                return
            yield values


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
