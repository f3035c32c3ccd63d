"""The files that metrics are written to: ``metrics.jsonl``, and the event files that TensorBoard and VisualDL show."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from paddledsv4.observe.metrics.formats import check_installed

FILE = "metrics.jsonl"
Record = dict[str, float]  # {"step": number, tag: number, ...}


class Viewer(Protocol):
    """Event files in a folder of their own."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step by tag, on disk when this returns, or at :meth:`close` where it says so."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard:
    """``events.out.tfevents.*``, one scalar per tag."""

    def __init__(self, folder: Path):
        from tensorboard.summary import Writer

        _remove(folder.glob("events.out.tfevents.*"))
        self._writer = Writer(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class VisualDL:
    """``vdlrecords.*.log``, one scalar per tag; VisualDL itself decides when to write to disk."""

    def __init__(self, folder: Path):
        from visualdl import LogWriter

        _remove(folder.glob("vdlrecords.*"))
        self._writer = LogWriter(logdir=str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag=tag, value=value, step=step)

    def close(self) -> None:
        self._writer.close()


VIEWERS: dict[str, type[Viewer]] = {"tensorboard": TensorBoard, "visualdl": VisualDL}


class MetricsLog:
    """``metrics.jsonl`` in ``folder``, a line per step, flushed at once; other formats in folders named after them.

    ``resumed``: the step that a run goes on after. Lines up to it stay and the others go; the other formats, which
    nothing can be taken out of, are written anew from them. None begins everything anew.
    """

    def __init__(self, folder: Path, formats: Iterable[str] = (), resumed: int | None = None):
        check_installed(formats)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        kept = [] if resumed is None else [line for line in read_metrics(path) if line["step"] <= resumed]
        fresh = path.with_suffix(".part")
        self._file = fresh.open("w", encoding="utf-8")
        self._viewers = [VIEWERS[name](folder / name) for name in dict.fromkeys(formats) if name in VIEWERS]
        for line in kept:
            step = int(line.pop("step"))
            self.write(step, line)
        fresh.replace(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step by tag."""
        written = {tag: x if math.isfinite(x) else str(x) for tag, x in values.items()}  # JSON has no number for it
        self._file.write(json.dumps({"step": step} | written, allow_nan=False) + "\n")
        self._file.flush()
        for viewer in self._viewers:
            viewer.write(step, values)

    def close(self) -> None:
        """Close all files."""
        self._file.close()
        for viewer in self._viewers:
            viewer.close()


def read_metrics(path: Path) -> list[Record]:
    """The lines of a log of metrics up to the first that is not whole; none if there is no such file."""
    records = []
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = {tag: float(x) for tag, x in json.loads(line).items()}
            records.append(record | {"step": int(record["step"])})
    return records


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink()
