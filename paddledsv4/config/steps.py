"""Steps of a run as people write them: "5", "5:8" with both ends, or a list such as "1,5:8"."""

from __future__ import annotations

import re

_SPAN = re.compile(r"([0-9]{1,9})(?::([0-9]{1,9}))?")


def span_in(text: str) -> tuple[int, int] | None:
    """ "5:8" -> (5, 8) and "5" -> (5, 5): first and last step, both included; None if it is no such text."""
    found = _SPAN.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    return (first, last) if 1 <= first <= last else None


def spans_in(text: str) -> list[tuple[int, int]] | None:
    """ "1, 5 : 8" -> [(1, 1), (5, 8)]; None if any part is no span."""
    spans = [span_in(":".join(map(str.strip, part.split(":")))) for part in text.split(",")]
    return None if None in spans else spans
