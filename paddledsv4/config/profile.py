"""Which steps of which ranks are profiled."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.steps import span_in

Rank = Annotated[int, Field(ge=0)]


class ProfileConfig(StrictConfig):
    """``steps``: "5:8", both included, or "5"; none by default. ``ranks``: those that leave a profile."""

    SECTION: ClassVar[str] = "observe.profile."

    steps: str | None = None
    ranks: Annotated[tuple[Rank, ...], Field(strict=False)] = (0,)

    @model_validator(mode="after")
    def _steps_are_a_span(self) -> Self:
        if self.steps is not None and span_in(self.steps) is None:
            self.reject("steps", 'must be a step, or the first and the last one such as "5:8"')
        return self

    @property
    def span(self) -> tuple[int, int]:
        """First and last step; (0, 0) if there are none."""
        return span_in(self.steps or "") or (0, 0)

    def check(self, world_size: int, last_step: int) -> None:
        """Whether a run of so many ranks and steps has what is asked for.

        Raises:
            UserError: it has not.
        """
        if self.steps is None:
            return
        if self.span[1] > last_step:
            self.reject("steps", f"must lie in 1 to {last_step}, the last step of this run")
        if max(self.ranks, default=0) >= world_size:
            self.reject("ranks", f"must be below {world_size}, the number of ranks")
