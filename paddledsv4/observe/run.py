"""What a run is watched by, as its configuration says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.config.observe import ObserveConfig
from paddledsv4.observe.losses import LossGuard
from paddledsv4.observe.steps import attached

if TYPE_CHECKING:
    from paddledsv4.training.trainer import Trainer


@contextlib.contextmanager
def observing(trainer: Trainer, config: ObserveConfig, folder: Path) -> Iterator[None]:
    """Watch the steps of ``trainer`` in this block; what is found goes to ``folder``. Every rank enters it."""
    with contextlib.ExitStack() as watchers:
        if config.trace_attention:  # before the guard, so that a step that is not finite leaves its trace
            from paddledsv4.observe.attention import AttentionTrace

            trace = AttentionTrace(trainer, config.trace_attention, folder)
            watchers.callback(trace.close)
            watchers.enter_context(attached(trainer, trace))
        if config.check_finite == "full":
            from paddledsv4.observe.guard import FiniteGuard

            watchers.enter_context(FiniteGuard(trainer, folder).watching())
            rest = LossGuard("no operation gave it, so it comes from the code between them")
            watchers.enter_context(attached(trainer, rest))
        elif config.check_finite == "loss":
            watchers.enter_context(attached(trainer, LossGuard()))
        yield
