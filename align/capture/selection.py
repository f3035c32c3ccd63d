"""What to record: steps, microbatches, names, kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate

from paddledsv4.errors import UserError

KINDS = ("forward", "gradients", "param_grads", "optimizer", "choices")


@dataclass(frozen=True)
class Selection:
    """Steps count from 1, microbatches from 0; in a glob of ``names``, * runs over dots."""

    steps: tuple[int, ...] = (1,)
    microbatches: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ("*",)
    what: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        for kind in self.what:
            if kind not in KINDS:
                raise UserError(f"--what {kind}: choose among {', '.join(KINDS)}")
        if not self.steps or min(self.steps) < 1:
            raise UserError("--steps: name at least one step; they count from 1")
        if not self.microbatches or min(self.microbatches) < 0:
            raise UserError("--microbatches: name at least one microbatch; they count from 0")
        if not self.names:
            raise UserError("--names: give at least one glob")

    @property
    def pattern(self) -> str:
        """One regular expression for all globs; it wants the whole name."""
        return "|".join(rf"\A{translate(glob)}" for glob in self.names)

    def wants(self, name: str) -> bool:
        """Whether a tensor is recorded; a second pass through the same place, NAME#2, goes with the first."""
        return re.match(self.pattern, name.split("#")[0]) is not None

    def only(self, tensors: dict) -> dict:
        """The entries of ``tensors`` whose names are wanted."""
        return {name: tensor for name, tensor in tensors.items() if self.wants(name)}

    def check_names(self, known: Iterable[str]) -> None:
        """Every glob must match one of ``known``.

        Raises:
            UserError: one does not; with an example of what there is.
        """
        known = list(known)
        for glob in self.names:
            if not any(re.match(translate(glob), name) for name in known):
                some = ", ".join(known[:: max(1, len(known) // 3)][:3])
                raise UserError(f"--names {glob}: matches nothing; there are {len(known)} names, such as {some}")


def numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1,3-5" -> (1, 3, 4, 5), sorted, each once.

    Raises:
        UserError: it is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if not ends or int(ends[2] or ends[1]) - int(ends[1]) not in range(100_000):
            raise UserError(f"{option} {text}: must be numbers with commas, such as 1,2 or 1-3")
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))
