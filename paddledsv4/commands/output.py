"""Which rank says it: every line of one rank of many begins with [rank N]."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Prefixed:
    """A text stream on which every line begins with ``prefix``, however it is written piece by piece."""

    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self.prefix, self._at_start = stream, prefix, True

    def write(self, text: str) -> int:
        """All lines in one piece, so that those of several ranks do not mix."""
        lines = text.splitlines(keepends=True)
        starts = [self._at_start, *(line.endswith("\n") for line in lines)]
        self.stream.write("".join(f"{self.prefix}{x}" if start else x for start, x in zip(starts, lines, strict=False)))
        self._at_start = starts[-1]
        return len(text)

    def writelines(self, lines) -> None:
        """Each as it is."""
        self.write("".join(lines))

    def isatty(self) -> bool:
        """No: progress bars of several ranks would overwrite each other."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def name_rank(rank: int) -> None:
    """Everything that this process prints from now on says which rank it is from."""
    prefix = f"[rank {rank}] "
    sys.stdout, sys.stderr = Prefixed(sys.stdout, prefix), Prefixed(sys.stderr, prefix)
