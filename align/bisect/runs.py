"""Trials with a memory: every finished run is a file, so that an interrupted bisection goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from align.bisect.budget import Budget
from align.bisect.trial import Outcome, Trial
from align.bisect.watch import Watch
from align.files import write_whole
from paddledsv4.errors import UserError
from paddledsv4.host import BITWISE_ENVIRONMENT, ENVIRONMENT
from paddledsv4.numerics.policy import Policy

FOLDER = "bisect-runs"  # inside the output directory


class Runs:
    """Outcomes by policy: from memory, from ``directory``/bisect-runs, or from a new run that ``budget`` allows.

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(self, trial: Trial, directory: Path, budget: Budget, watch: Watch):
        self.trial, self.folder, self.budget, self.watch = trial, directory / FOLDER, budget, watch
        self.known: dict[str, Outcome] = {}
        self.weights: tuple[str, ...] = ()  # of the run with all switches flipped, for the words on progress
        self.setting = setting(trial)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}; choose another --out") from None

    @property
    def count(self) -> int:
        """How many different policies the result rests on, remembered ones included."""
        return len(self.known)

    @property
    def new(self) -> int:
        """How many runs were made."""
        return self.budget.used

    def outcome(self, policy: Policy, what: str, like: tuple[str, ...] | None = None) -> Outcome:
        """The outcome of a run with ``policy``; given the weights ``like``, one that stopped at the first difference
        from them, or from the bundle's losses, will do.

        Raises:
            BudgetSpent: it needs a run that the budget does not allow.
        """
        name = policy.fingerprint
        found = self.known.get(name) or self._remembered(name)
        known = found is not None and (found.whole or (like is not None and found.same(like) is not None))
        if not known:
            self.budget.spend()
            self.watch.begins(what)
            found = self.trial.run(policy, like)
            if not found.error:  # a failure may pass: it is tried again when the command is repeated
                write_whole(self._path(name), found.model_dump_json(indent=1) + "\n")
        if name not in self.known or not known:
            self.watch.ended(what, found.text(self.weights), known)
        self.known[name] = found
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.setting}.json"

    def _remembered(self, name: str) -> Outcome | None:
        try:
            return Outcome.model_validate_json(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):  # absent or damaged: run it again
            return None


def setting(trial: Trial) -> str:
    """Twelve hex digits for all that a run's outcome depends on beside the policy: the bundle's files, the number of
    steps, the precision, the code of both packages, the versions of the kernels' packages, the environment."""
    import align
    import paddledsv4

    said = {
        "bundle": digest(path for path in trial.bundle.path.iterdir() if path.is_file()),
        "steps": trial.steps,
        "precision": trial.precision,
        "code": [digest(Path(package.__file__).parent.rglob("*.py")) for package in (align, paddledsv4)],
        "versions": {name: _version(name) for name in ("paddlepaddle", "paddlepaddle-gpu", "torch", "numpy")},
        "environment": {name: os.environ.get(name) for name in (*ENVIRONMENT, *BITWISE_ENVIRONMENT)},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files in one folder or package."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
