"""What capturing costs: the time spent inside it, told per step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps

from typing_extensions import Self


class Stopwatch:
    """Adds up the time inside its ``with`` blocks; a block within another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._since = 0.0, 0, 0.0

    def __enter__(self) -> Self:
        self._since = time.perf_counter() if self._depth == 0 else self._since
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._since

    def timed(self, function: Callable) -> Callable:
        """``function`` with its time counted."""

        @wraps(function)
        def timed(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return timed

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
