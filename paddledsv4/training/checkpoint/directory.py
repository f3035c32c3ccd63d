"""The folder of a run's checkpoints::

    iter_0000010/        complete; 10 is the number of completed steps
        checkpoint.json      step, configuration, numerics, and the size and MD5 of every other file
        rank_00000.safetensors, rank_00000.json, ...
    iter_0000015.part/   being written, or being deleted; never read
    latest               the name of the newest complete one

A folder gets its name by one rename, after everything in it is on the disk, and ``latest`` is replaced after that.
So whenever a run is killed, what ``latest`` names is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddledsv4.errors import UserError

RECORD, LATEST, PART = "checkpoint.json", "latest", ".part"
_NAME = re.compile(r"iter_(\d{7,})")


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """The whole text or the file that was there before, whatever happens."""
    fresh = path.with_name(path.name + PART)
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    os.replace(fresh, path)
    sync(path.parent)


def write_json(path: Path, values: dict[str, Any], indent: int | None = None) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Directory:
    """The folder at ``path``, which need not exist yet."""

    path: Path

    @staticmethod
    def name(step: int) -> str:
        """``iter_`` and seven digits, as Megatron's."""
        return f"iter_{step:07d}"

    def folder(self, step: int) -> Path:
        """Where the complete checkpoint is, or would be."""
        return self.path / self.name(step)

    def part(self, step: int) -> Path:
        """Where it is while it is written."""
        return self.path / (self.name(step) + PART)

    def complete(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        names = (_NAME.fullmatch(path.parent.name) for path in self.path.glob(f"iter_*/{RECORD}"))
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """The step that ``latest`` names; None without that file.

        Raises:
            UserError: it names nothing.
        """
        file = self.path / LATEST
        with contextlib.suppress(FileNotFoundError):
            text = file.read_bytes().decode("utf-8", "replace").strip()
            name = _NAME.fullmatch(text)
            if not name:
                raise UserError(f"{file}: {text[:40]!r} is not the name of a checkpoint{self.offer()}")
            return int(name[1])
        return None

    def offer(self, before: int | None = None) -> str:
        """The end of a message about a broken checkpoint: which older complete one there is."""
        steps = [step for step in self.complete() if before is None or step < before]
        if not steps:
            return "; there is no earlier complete checkpoint"
        return f"; an earlier complete checkpoint is there: --resume {self.folder(steps[-1])}"

    def begin(self, step: int) -> Path:
        """An empty folder to write into."""
        part = self.part(step)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        return part

    def publish(self, step: int, base: int | None) -> int | None:
        """Make what was written at :meth:`part` the latest checkpoint. Returns the one that was the latest before.

        ``base``: the checkpoint that this run saved last or started from. Only it may be the latest while one of the
        same step, left by a run that got further before, makes way.
        """
        part, folder = self.part(step), self.folder(step)
        before = self.latest()
        sync(part)
        if folder.exists():
            if base is None or base == step:
                raise UserError(f"{folder} exists already; give this run another folder")
            self.point(base)
            before = base
            self.delete(step)
        os.rename(part, folder)
        sync(self.path)
        self.point(step)
        return before

    def point(self, step: int) -> None:
        """Make ``latest`` name a complete checkpoint."""
        write_text(self.path / LATEST, self.name(step) + "\n")

    def retain(self, step: int, before: int | None, interval: int | None) -> None:
        """After saving ``step``: delete the one before, unless its step is a multiple of ``interval``.

        One that is a symbolic link stays, as in Megatron.
        """
        if interval is None or not before or before == step or before % interval == 0:
            return
        if not self.folder(before).is_symlink():
            self.delete(before)

    def delete(self, step: int) -> None:
        """Take the name away first: what is left of a folder is never taken for a checkpoint."""
        doomed = self.path / f"{self.name(step)}.deleted{PART}"
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.folder(step), doomed)
            sync(self.path)
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed run left half written or half deleted."""
        for path in self.path.glob(f"iter_*{PART}"):
            shutil.rmtree(path, ignore_errors=True)


def find(source: Path) -> tuple[Directory, int]:
    """The checkpoint that a path means: an iter_N itself, or the latest in a folder.

    Raises:
        UserError: there is none.
    """
    name = _NAME.fullmatch(source.resolve().name)
    if name:
        directory, step = Directory(source.resolve().parent), int(name[1])
    else:
        directory = Directory(source)
        if (step := directory.latest()) is None:
            others = directory.complete()
            more = f"; it holds {directory.folder(others[-1])}, which can be named itself" if others else ""
            raise UserError(f"{source}: holds no checkpoint: no file {LATEST}{more}")
    folder = directory.folder(step)
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: is no complete checkpoint: no {RECORD}{directory.offer(step)}")
    return directory, step
