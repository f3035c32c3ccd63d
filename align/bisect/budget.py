"""How much a bisection may cost before it stops, to be taken up again later."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from paddledsv4.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600}


class BudgetSpent(Exception):
    """The next run would be one too many."""


@dataclass
class Budget:
    """At most ``runs`` new runs, none of them begun ``seconds`` after the first; None means no limit."""

    runs: int | None = None
    seconds: float | None = None
    used: int = 0
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """From ``40`` (runs) or ``90s``, ``10m``, ``1.5h``.

        Raises:
            UserError: neither, or nothing left to spend.
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)([smh])", text.strip(), re.ASCII)
        if not found or not float(found[1] or found[2]):
            raise UserError(f"--budget {text}: give a number of runs, such as 40, or a time, such as 90s, 10m or 1h")
        return cls(runs=int(found[1])) if found[1] else cls(seconds=float(found[2]) * UNITS[found[3]])

    def spend(self) -> None:
        """Account for a run that is about to begin.

        Raises:
            BudgetSpent: it must not.
        """
        late = self.seconds is not None and time.monotonic() - self.began >= self.seconds
        if late or (self.runs is not None and self.used >= self.runs):
            raise BudgetSpent
        self.used += 1
