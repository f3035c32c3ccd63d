"""Compare two runs loss by loss. The reference says how many losses there are; what is absent does not match.

Two losses match when nothing says that they differ: MD5s, where both logs have them, are equal, the values
are equal as float32 numbers, bit by bit, and neither is NaN (a NaN equals nothing, whatever its MD5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from align.issues import Issues
from align.losslog import LossLog, LossSeries, Position, float32, loss_md5, loss_text, position_text, unpack
from align.ulp import ulp_distance
from paddledsv4.errors import UserError

PIECE = 1 << 16  # entries compared at once; the temporary arrays of a whole log would be large


@dataclass(frozen=True)
class SeriesComparison:
    """One kind of loss, compared.

    Attributes:
        matches, expected: K of N, where N is the number of reference entries.
        first_diff: position of the first entry that does not match, None when all do.
        max_abs_diff: over the entries that both logs have; NaN when one is NaN, None when there is none.
        max_ulp: likewise, in float32 steps.
        missing, extra: entries of the reference that the candidate lacks, and the other way round.
    """

    matches: int
    expected: int
    first_diff: Position | None
    max_abs_diff: float | None
    max_ulp: float | None
    missing: int
    extra: int


@dataclass(frozen=True)
class LastLoss:
    """The candidate's last loss of one kind."""

    step: int
    value: float
    md5: str


@dataclass
class Comparison:
    """The outcome; :meth:`render` puts it in words."""

    main: SeriesComparison
    mtp: SeriesComparison
    last_main: LastLoss | None
    last_mtp: LastLoss | None
    last_step: int
    issues: Issues
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when every loss matches and neither log has an issue."""
        return (
            self.main.matches == self.main.expected
            and self.mtp.matches == self.mtp.expected
            and not self.issues
        )

    @property
    def exit_code(self) -> int:
        """0 when :attr:`ok`, else 1."""
        return 0 if self.ok else 1

    def render(self) -> str:
        """Notes and issues, then the verdict in ten lines of a fixed form."""
        lines = [f"note: {note}" for note in self.notes]
        shown = list(self.issues)
        lines += [f"issue: {issue}" for issue in shown]
        if self.issues.count > len(shown):
            lines.append(f"issue: ... {self.issues.count} in all")
        kinds = (("main", self.main), ("mtp", self.mtp))
        lines += [f"{kind}_matches={side.matches}/{side.expected}" for kind, side in kinds]
        lines += [f"first_{kind}_diff={side.first_diff and tuple(side.first_diff)}" for kind, side in kinds]
        lines += [
            f"max_{kind}_abs_diff={_number(side.max_abs_diff)} max_{kind}_ulp={_number(side.max_ulp)}"
            for kind, side in kinds
        ]
        for kind, last in (("main", self.last_main), ("mtp", self.last_mtp)):
            step = last.step if last else self.last_step
            value, md5 = (loss_text(last.value), last.md5) if last else (None, None)
            lines.append(f"step{step} {kind} final_loss={value} md5={md5}")
        return "\n".join(lines)


def compare_logs(
    reference: LossLog, candidate: LossLog, expected_steps: int | None = None, issues: Issues | None = None
) -> Comparison:
    """Compare ``candidate`` with ``reference``.

    Args:
        reference, candidate: resolved logs.
        expected_steps: only steps 1..expected_steps count, and each log must have all of them; None takes the
            reference as it is.
        issues: what reading the logs found; the comparison adds its own to it.

    Raises:
        UserError: the reference has no loss to compare with.
    """
    total = Issues("")
    if issues is not None:
        total.extend(issues)
    for log in (reference, candidate):
        _count_steps(log, expected_steps, total)
    main = _compare(reference.main.until(expected_steps), candidate.main.until(expected_steps))
    mtp = _compare(reference.mtp.until(expected_steps), candidate.mtp.until(expected_steps))
    if not main.expected and not mtp.expected:
        raise UserError(f"{reference.name} has no losses, so there is nothing to compare with")
    for kind, side in (("main", main), ("MTP", mtp)):
        if side.missing:
            _add(total, candidate, f"{side.missing} of {side.expected} {kind} losses are missing")
        if side.extra:
            _add(total, candidate, f"{side.extra} {kind} losses that the reference does not have")
    for kind in ("main", "mtp"):
        _compare_tokens(
            getattr(reference, f"{kind}_tokens"),
            getattr(candidate, f"{kind}_tokens"),
            kind,
            total,
            candidate,
            expected_steps,
        )
    last_main, last_mtp = (_last(series.until(expected_steps)) for series in (candidate.main, candidate.mtp))
    steps = [last.step for last in (last_main, last_mtp) if last]
    return Comparison(
        main,
        mtp,
        last_main,
        last_mtp,
        max(steps, default=0),
        total,
        [*reference.notes, *candidate.notes, *_asides(reference, candidate, expected_steps)],
    )


def matches(left: LossSeries, right: LossSeries) -> np.ndarray:
    """bool [n]: which entries of two series with the same positions match."""
    one, other = float32(left.values), float32(right.values)
    md5s_differ = (left.md5s != right.md5s).any(axis=1) & left.md5s.any(axis=1) & right.md5s.any(axis=1)
    return (one.view(np.uint32) == other.view(np.uint32)) & ~np.isnan(one) & ~md5s_differ


def _compare(reference: LossSeries, candidate: LossSeries) -> SeriesComparison:
    here, there = common(reference.keys, candidate.keys)
    equal = 0
    worst: list[tuple[float, float]] = []
    matching = np.zeros(len(reference), bool)
    for start in range(0, len(here), PIECE):
        part = slice(start, start + PIECE)
        left, right = reference.take(here[part]), candidate.take(there[part])
        same = matches(left, right)
        matching[here[part]] = same
        equal += int(np.count_nonzero(same))
        worst.append(
            (
                float(_distance(left.values, right.values).max()),
                float(ulp_distance(float32(left.values), float32(right.values)).max()),
            )
        )
    missing, extra = len(reference) - len(here), len(candidate) - len(there)
    first = int(np.argmin(matching)) if equal < len(reference) else None
    max_abs, max_ulp = np.max(worst, axis=0) if worst else (None, None)  # numpy's max keeps NaN
    return SeriesComparison(
        equal,
        len(reference),
        None if first is None else unpack(reference.keys[first]),
        max_abs,
        max_ulp,
        missing,
        extra,
    )


def common(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the keys that two increasing arrays share."""
    if not len(left) or not len(right):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if np.array_equal(left, right):  # nearly always; half the memory
        everything = np.arange(len(left))
        return everything, everything
    index = np.searchsorted(right, left)
    np.minimum(index, len(right) - 1, out=index)
    here = np.flatnonzero(right[index] == left)
    return here, index[here]


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """|left - right| in float64; equal infinities are 0 apart, NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(left == right, 0.0, np.abs(left - right))


def _count_steps(log: LossLog, expected: int | None, issues: Issues) -> None:
    if expected is None:
        return
    steps = (log.main if len(log.main) else log.mtp).until(expected).steps()
    if steps < expected:
        _add(issues, log, f"has losses of {steps} steps, but {expected} are expected")


def _add(issues: Issues, log: LossLog, what: str) -> None:
    named = Issues(log.name)
    named.add(what)
    issues.extend(named)


def _compare_tokens(
    reference: LossSeries, candidate: LossSeries, kind: str, issues: Issues, log: LossLog, steps: int | None
) -> None:
    """Unreduced losses: where the shapes agree, the MD5s must."""
    reference, candidate = reference.until(steps), candidate.until(steps)
    here, there = common(reference.keys, candidate.keys)
    left, right = reference.take(here), candidate.take(there)
    differ = np.flatnonzero((left.values == right.values) & (left.md5s != right.md5s).any(axis=1))
    if len(differ):
        _add(
            issues,
            log,
            f"{len(differ)} {kind} per_token_loss MD5s differ, first at "
            f"{position_text(left.keys[differ[0]])}",
        )


def _last(series: LossSeries) -> LastLoss | None:
    """The entry of the largest (step, microbatch, rank)."""
    if not len(series):
        return None
    value = float(series.values[-1])
    return LastLoss(unpack(series.keys[-1]).step, value, series.md5(len(series) - 1) or loss_md5(value))


def _asides(reference: LossLog, candidate: LossLog, steps: int | None) -> list[str]:
    """Gradient norms and final weights: told, not judged, for trainers name and order them differently."""
    asides = []
    norms, others = reference.grad_norms.until(steps), candidate.grad_norms.until(steps)
    here, there = common(norms.keys, others.keys)
    if len(here):
        equal = int(np.count_nonzero(norms.values[here] == others.values[there]))
        asides.append(f"gradient norms: {equal} of {len(norms)} equal")
    weights = reference.final_weights_md5, candidate.final_weights_md5
    if all(weights) and reference.main.steps() == candidate.main.steps():
        finite = all(np.isfinite(series.values).all() for series in (norms, others))
        told = "equal MD5s" if weights[0] == weights[1] else "different MD5s"
        asides.append(f"final weights: {told if finite else 'not compared, a gradient norm is not finite'}")
    return asides


def _number(value: float | None) -> str:
    """Whole numbers without a fraction, others with all their digits."""
    return f"{value:.0f}" if value is not None and float(value).is_integer() else str(value and float(value))
