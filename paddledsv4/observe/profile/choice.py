"""Which ranks and steps to profile, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Self

from paddledsv4.errors import UserError


@dataclass(frozen=True)
class ProfileChoice:
    """Ranks, and the first and the last step."""

    ranks: tuple[int, ...]
    first: int
    last: int

    @classmethod
    def from_texts(cls, ranks: str | None, steps: str | None, world_size: int, last_step: int) -> Self | None:
        """``ranks`` such as "0,3", rank 0 if left out; ``steps`` such as "5:8", or "5" for one; None: no profile.

        Raises:
            UserError: they are not like that, or the run has no such rank or step.
        """
        if steps is None:
            if ranks is not None:
                raise UserError("--profile-ranks needs --profile-steps, such as 5:8")
            return None
        first, colon, last = steps.partition(":")
        last = last if colon else first
        span = (int(first), int(last)) if _is_number(first) and _is_number(last) else (0, 0)
        if not 1 <= span[0] <= span[1] <= last_step:
            raise UserError(
                f"--profile-steps {steps}: must be FIRST:LAST, both profiled, of the steps 1 to {last_step} of this run"
            )
        chosen = tuple(dict.fromkeys((ranks or "0").split(",")))
        if not all(_is_number(rank) and int(rank) < world_size for rank in chosen):
            raise UserError(f"--profile-ranks {ranks}: must be ranks from 0 to {world_size - 1}, such as 0,3")
        return cls(tuple(map(int, chosen)), *span)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
