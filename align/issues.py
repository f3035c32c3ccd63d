"""What was wrong with a log, kept in bounded memory: the first few problems in words, the rest as a count."""

from __future__ import annotations

KEEP = 20


class Issues:
    """Problems of one log. False when there is none; iterating gives the first :data:`KEEP` in words."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._kept: list[str] = []

    def add(self, what: str, line: int | None = None, count: int = 1) -> None:
        """Record ``what`` (standing for ``count`` problems), at ``line`` (from 1) where it has one."""
        if self.count < KEEP:
            self._kept.append(f"{self.name}:{line}: {what}" if line else f"{self.name}: {what}")
        self.count += count

    def extend(self, other: Issues) -> None:
        """Take over the problems of ``other``."""
        self._kept = [*self._kept, *other._kept][:KEEP]
        self.count += other.count

    def __bool__(self) -> bool:
        return self.count > 0

    def __iter__(self):
        return iter(self._kept)
