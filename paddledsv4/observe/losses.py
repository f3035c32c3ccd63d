"""The guard that costs nothing: losses and gradient norm of each step, which are on the host anyway."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from paddledsv4.errors import UserError
from paddledsv4.observe.steps import StepObserver

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult


class NotFinite(UserError):
    """A number of the run is NaN or infinite; the step that it belongs to is not saved."""


class LossGuard(StepObserver):
    """Stops the run at the first loss or gradient norm that is not finite; ``hint`` says what to do then."""

    def __init__(self, hint: str = "run again with --check-finite full to see which operation it comes from"):
        self.hint = hint

    def end_step(self, result: StepResult) -> None:
        """Every rank holds the losses of all ranks, so all stop at the same step.

        Raises:
            NotFinite: it names the first number that is not finite, by microbatch and rank.
        """
        wrong = first_not_finite(result)
        if wrong:
            raise NotFinite(f"step {result.step}, {wrong}: training stopped before this step is saved; {self.hint}")


def first_not_finite(result: StepResult) -> str | None:
    """The first loss, or else the gradient norm, that is not finite, in words; None if all are finite."""
    for loss in result.losses:
        for name, value in (("main", loss.main), ("MTP", loss.mtp)):
            if value is not None and not math.isfinite(value):
                return f"microbatch {loss.microbatch}, rank {loss.rank}: the {name} loss is {value}"
    return None if math.isfinite(result.grad_norm) else f"gradient norm is {result.grad_norm}"
