"""What the lines of a log say, before it is known which step each positional line belongs to.

Two kinds of lines exist. Keyed ones name their step and microbatch (JSON lines, ``step N mb M ...``).
Positional ones do not: the i-th such line *of a rank* belongs to the i-th loss that this rank computed.

* With ``M`` microbatches per step, the p-th microbatch of a rank (from 0) is microbatch ``p % M`` of step
  ``p // M + 1``.
* ``[LOSS_PATH_MD5]`` and ``[MTP_LOSS_PATH_MD5]`` lines come once per microbatch each.
* ``final_loss:`` (and ``per_token_loss:``) lines come twice, main then MTP or the reverse: the log's *order*.
"""

from __future__ import annotations

from array import array
from collections import defaultdict

import numpy as np

from align.issues import Issues
from align.losslog import NO_MD5, LossLog, LossSeries, Rows, SeriesBuilder, append, float32, merge

MAIN_FIRST, MTP_FIRST, MAIN_ONLY, AUTO = "main-first", "mtp-first", "main-only", "auto"
HEAD = 4096  # lines of a rank that decide about the order
ORDERS = (MAIN_FIRST, MTP_FIRST, MAIN_ONLY)


class Stream:
    """Positional lines of one rank, in the order of the log."""

    def __init__(self) -> None:
        self.values, self.md5s, self.lines = array("d"), bytearray(), array("I")
        self.unreadable: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: float, md5: bytes, line: int) -> None:
        """Append the value and the 16 bytes of MD5 of one line."""
        self.values.append(value)
        self.md5s += md5
        self.lines.append(line)

    def extend(self, rows: Rows) -> None:
        """Append many lines at once; their keys do not matter."""
        append(self.values, rows.values)
        self.md5s += rows.md5s.tobytes()
        append(self.lines, rows.lines)

    def skip(self, line: int) -> None:
        """Keep the place of a line that cannot be read, so that the lines after it keep their positions."""
        self.unreadable.append(len(self))
        self.append(float("nan"), NO_MD5, line)

    def head(self) -> Stream:
        """A copy of the first :data:`HEAD` lines."""
        head = Stream()
        head.values, head.md5s, head.lines = self.values[:HEAD], self.md5s[: 16 * HEAD], self.lines[:HEAD]
        head.unreadable = [index for index in self.unreadable if index < HEAD]
        return head


class RawLog:
    """The lines of one log by kind. Readers fill it; :meth:`resolve` makes a :class:`LossLog` of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.issues = Issues(name)
        self.main, self.mtp, self.grad_norms = SeriesBuilder(), SeriesBuilder(), SeriesBuilder()
        self.final: dict[int, Stream] = defaultdict(Stream)
        self.tokens: dict[int, Stream] = defaultdict(Stream)
        self.main_path: dict[int, Stream] = defaultdict(Stream)
        self.mtp_path: dict[int, Stream] = defaultdict(Stream)
        self.header: dict = {}
        self.final_weights_md5: str | None = None

    def settle(self) -> None:
        """The log is read: free what is no longer needed, or held twice."""
        for builder in (self.main, self.mtp, self.grad_norms):
            builder.settle()
        if self.main.keys == self.mtp.keys:
            self.mtp.keys = self.main.keys

    def head(self) -> RawLog:
        """The beginning of a log that only has ``final_loss:`` lines; enough to tell its order."""
        head = RawLog(self.name)
        head.final.update((rank, stream.head()) for rank, stream in self.final.items())
        return head

    @property
    def positional(self) -> bool:
        """True when positions must be counted."""
        return bool(self.final or self.main_path or self.mtp_path)

    def resolve(
        self, order: str = AUTO, microbatches: int | None = None, hint: LossLog | None = None
    ) -> tuple[LossLog, Issues]:
        """Give every line its position.

        Args:
            order: of ``final_loss:`` lines: one of :data:`ORDERS`, or ``auto``: the order under which more
                losses equal those of this log's own ``LOSS_PATH`` lines, or else of ``hint`` (in doubt the
                order whose values lie closer).
            microbatches: per step; None takes it from the hint, and without one every microbatch is a step.
            hint: the log on the other side of the comparison.

        Returns:
            The log and everything that is wrong with it.
        """
        issues = Issues(self.name)
        issues.extend(self.issues)
        log = LossLog(
            self.name,
            self.main.build(issues, "main loss"),
            self.mtp.build(issues, "MTP loss"),
            self.grad_norms.build(issues, "gradient norm"),
            self.final_weights_md5,
            self.header,
        )
        if self.positional:
            self._place(log, issues, order, microbatches, hint)
        if not len(log.main) and not len(log.mtp):
            issues.add("no loss lines found")
        return log, issues

    def _place(
        self, log: LossLog, issues: Issues, order: str, microbatches: int | None, hint: LossLog | None
    ) -> None:
        per_step = microbatches or log.microbatches() or (hint and hint.microbatches())
        if not per_step:
            per_step = 1
            log.notes.append(
                f"{self.name} does not say how many microbatches a step has: each one counts as a step "
                "(--microbatches M)"
            )
        main_path = _placed(self.main_path, 0, 1, per_step, issues, "[LOSS_PATH_MD5]")
        mtp_path = _placed(self.mtp_path, 0, 1, per_step, issues, "[MTP_LOSS_PATH_MD5]")
        log.main, log.mtp = (
            merge(log.main, main_path, issues, "main loss"),
            merge(log.mtp, mtp_path, issues, "MTP loss"),
        )
        if not self.final:
            return
        if order == AUTO:
            known = log if len(log.main) else hint
            order = self.detect(per_step, known)
            why = "which fits the other losses better" if known else "for nothing tells the order"
            log.notes.append(f"{self.name}: its final_loss lines are read {order}, {why}")
        main, mtp = _split(self.final, order, per_step, issues, "final_loss")
        log.main, log.mtp = (
            merge(log.main, main, issues, "main loss"),
            merge(log.mtp, mtp, issues, "MTP loss"),
        )
        if self.tokens:
            log.main_tokens, log.mtp_tokens = _split(self.tokens, order, per_step, issues, "per_token_loss")
            _same_count(self.tokens, self.final, issues)

    def detect(self, per_step: int, hint: LossLog | None) -> str:
        """The order of the ``final_loss:`` lines under which the first of them fit the hint best."""
        if hint is None:
            return MAIN_FIRST
        lines = sum(len(stream) for stream in self.final.values())
        if len(hint.main) and not len(hint.mtp) and (hint.name != self.name or lines <= len(hint.main)):
            return MAIN_ONLY
        quiet, head = Issues(self.name), {rank: stream.head() for rank, stream in self.final.items()}
        scores = {
            order: _likeness(*_split(head, order, per_step, quiet, ""), hint)
            for order in (MAIN_FIRST, MTP_FIRST)
        }
        return max(scores, key=scores.get)


def _split(
    streams: dict[int, Stream], order: str, per_step: int, issues: Issues, kind: str
) -> tuple[LossSeries, LossSeries]:
    """Main and MTP series of streams in which both alternate."""
    if order == MAIN_ONLY:
        return _placed(streams, 0, 1, per_step, issues, kind), LossSeries.empty()
    series = (
        _placed(streams, 0, 2, per_step, issues, kind),
        _placed(streams, 1, 2, per_step, Issues(""), kind),
    )  # the same issues a second time
    return series if order == MAIN_FIRST else series[::-1]


def _placed(
    streams: dict[int, Stream], start: int, stride: int, per_step: int, issues: Issues, kind: str
) -> LossSeries:
    """The lines ``start::stride`` of every rank as one series with positions."""
    parts, counts = [LossSeries.empty()], {}
    for rank, stream in sorted(streams.items()):
        values, md5s = np.frombuffer(stream.values), np.frombuffer(stream.md5s, np.uint64).reshape(-1, 2)
        index = np.flatnonzero(~_repeated(stream, values, md5s, stride, issues, kind))
        counts[rank] = len(index)
        if len(index) % (stride * per_step):
            issues.add(
                f"rank {rank} has {len(index)} {kind} lines, which is no multiple of {stride * per_step} "
                f"({stride} per microbatch, {per_step} microbatches per step): lines are missing"
            )
        index = index[start::stride]
        place = np.arange(len(index))
        keys = (place // per_step + 1) << 32 | (place % per_step) << 16 | rank
        part = LossSeries(keys, values[index], md5s[index])
        parts.append(part.take(~np.isin(index, stream.unreadable)) if stream.unreadable else part)
    if len(set(counts.values())) > 1:
        issues.add(f"ranks differ in their number of {kind} lines: {counts}")
    if len(parts) == 2:
        return parts[1]
    keys = np.concatenate([part.keys for part in parts])
    order = np.argsort(keys, kind="stable")
    return LossSeries(
        keys[order],
        np.concatenate([part.values for part in parts])[order],
        np.concatenate([part.md5s for part in parts])[order],
    )


def _repeated(
    stream: Stream, values: np.ndarray, md5s: np.ndarray, stride: int, issues: Issues, kind: str
) -> np.ndarray:
    """Mask of lines that say again what the line or microbatch before said: recomputation prints twice.

    Counting them would shift every later line by one; they are issues instead.
    """
    repeated = np.zeros(len(values), bool)
    for lag in range(1, stride + 1):
        same = (values[lag:] == values[:-lag]) & (md5s[lag:] == md5s[:-lag]).all(axis=1)
        repeated[lag:] |= same
    for index in np.flatnonzero(repeated):
        issues.add(
            f"duplicate {kind} line: the rank printed the same loss just before", line=stream.lines[index]
        )
    return repeated


def _same_count(tokens: dict[int, Stream], final: dict[int, Stream], issues: Issues) -> None:
    for rank in sorted({*tokens, *final}):
        one, other = len(tokens.get(rank, ())), len(final.get(rank, ()))
        if one != other:
            issues.add(
                f"rank {rank} has {one} per_token_loss lines but {other} final_loss lines: lines are missing"
            )


def _likeness(main: LossSeries, mtp: LossSeries, hint: LossLog) -> tuple[int, float]:
    """How well two series fit known losses: equal ones, then minus the summed distance."""
    equal, distance = 0, 0.0
    for series, known in ((main, hint.main), (mtp, hint.mtp)):
        _, here, there = np.intersect1d(series.keys, known.keys, assume_unique=True, return_indices=True)
        both = (series.md5s[here] == known.md5s[there]).all(axis=1) & series.md5s[here].any(axis=1)
        gap = np.abs(float32(series.values[here]) - float32(known.values[there]))
        equal += int(np.count_nonzero(both | (gap == 0)))
        distance += float(np.nansum(gap[np.isfinite(gap)]))
    return equal, -distance
