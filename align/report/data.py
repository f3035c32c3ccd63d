"""Everything that a report says, gathered once; the three formats only lay it out."""

from __future__ import annotations

import platform
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.bundle import Bundle, find_bundle, load_bundle
from align.compare import Comparison, compare_logs
from align.losslog import LossLog
from align.readlog import read_log
from align.report.curves import Curve, curve
from align.report.inputs import Attribution, Distance, read_attributions, read_distances
from paddledsv4.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One line of the environment: what the run had, and what the reference had (None where unknown)."""

    name: str
    here: str | None
    reference: str | None

    @property
    def differs(self) -> bool:
        return self.reference is not None and self.here != self.reference


@dataclass(frozen=True)
class Report:
    """What :func:`gather` found out about the run in directory ``run``."""

    run: Path
    bundle: Bundle
    header: dict[str, Any]
    comparison: Comparison
    curves: list[Curve]
    distances: list[Distance]
    policy: dict[str, str]
    attributions: dict[str, Attribution]
    settings: list[Setting]
    commands: list[str]


def gather(run: Path, bundle: str | None = None) -> Report:
    """Read the result of ``align run`` and compare it with its bundle.

    Args:
        run: the directory with losses.jsonl.
        bundle: path or shipped name; what losses.jsonl says by default.

    Raises:
        UserError: something is missing or malformed.
    """
    if not (run / "losses.jsonl").is_file():
        raise UserError(f"{run} has no losses.jsonl: give the directory that align run wrote")
    candidate, issues = read_log(run / "losses.jsonl").resolve()
    header = candidate.header
    found = load_bundle(bundle or _bundle_of(run, header))
    reference = found.losses()
    steps = header.get("steps")
    steps = steps if isinstance(steps, int) and 1 <= steps <= found.training.steps else found.training.steps
    comparison = compare_logs(reference, candidate, steps, issues)
    policy = header.get("policy")
    return Report(
        run=run,
        bundle=found,
        header=header,
        comparison=comparison,
        curves=_curves(reference, candidate, steps),
        distances=read_distances(run),
        policy={str(op): str(variant) for op, variant in policy.items()} if isinstance(policy, dict) else {},
        attributions=read_attributions(run),
        settings=_settings(header, found),
        commands=_commands(run, header, found, steps),
    )


def _bundle_of(run: Path, header: dict[str, Any]) -> str:
    for name in (header.get("bundle_path"), header.get("bundle")):
        if isinstance(name, str) and name:
            try:
                return str(find_bundle(name))
            except (UserError, ValueError, OSError):  # moved, or no file name at all
                continue
    raise UserError(f"{run / 'losses.jsonl'} does not say where its bundle is; give --bundle")


def _curves(reference: LossLog, candidate: LossLog, steps: int) -> list[Curve]:
    return [
        curve(kind, one.until(steps), other.until(steps))
        for kind, one, other in (
            ("main", reference.main, candidate.main), ("mtp", reference.mtp, candidate.mtp)
        )
        if len(one)
    ]  # fmt: skip


def _settings(header: dict[str, Any], bundle: Bundle) -> list[Setting]:
    here, there = header.get("environment"), bundle.source.get("environment")
    here, there = (known if isinstance(known, dict) else {} for known in (here, there))
    settings = [
        Setting(name, _text(here.get(name)), _text(there.get(name))) for name in sorted({*here, *there})
    ]
    known = [(name, header[name]) for name in ("paddle", "torch", "python", "machine") if header.get(name)]
    settings += [
        Setting(name, str(value), _text(bundle.source.get(name)) if name == "torch" else None) for name, value in known
    ]
    return [*settings, Setting("report made on", f"{platform.machine()}, Python {platform.python_version()}", None)]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _commands(run: Path, header: dict[str, Any], bundle: Bundle, steps: int) -> list[str]:
    """The shell commands that repeat the run and its verdict."""
    quote = shlex.quote
    where, out = quote(str(bundle.path)), quote(str(run))
    environment = header.get("environment")
    pins = [
        f"export {name}={quote(str(value))}"
        for name, value in (environment.items() if isinstance(environment, dict) else ())
        if value is not None and str(name).isidentifier()
    ]
    words = ["align run", where]
    numerics, precision = header.get("numerics"), header.get("precision")
    if isinstance(numerics, str) and numerics != "env":
        words += ["--numerics", quote(numerics)]
    if isinstance(precision, str) and precision != bundle.training.precision:
        words += ["--precision", quote(precision)]
    if steps != bundle.training.steps:
        words += ["--steps", str(steps)]
    compare = f"align compare {where} {out}" + (f" --steps {steps}" if steps != bundle.training.steps else "")
    return [*pins, f"{' '.join(words)} --out {out}", compare]
