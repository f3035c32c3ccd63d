"""From a bundle to the first op at fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.bundle import Bundle
from align.locate.forced import Diverged, Event, ForcedRun
from align.locate.reference import Recorded, record
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer

Progress = Callable[[str, int, int], None]


@dataclass
class Located:
    """Every comparison, in execution order, and the first fault among them; None when all is explained by rounding."""

    events: list[Event]

    @property
    def first(self) -> Event | None:
        return next((event for event in self.events if event.fault), None)

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if event.fault]

    def rows(self) -> list[dict[str, Any]]:
        """Layer by op by direction: the largest distance in ULPs, as ``align report`` reads it."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for event in self.events:
            if event.error is None or event.what not in ("result", "gradient"):
                continue
            direction = "forward" if event.what == "result" else "backward"
            direction = "optimizer" if event.op in ("adamw", "grad_norm", "expert_bias_update") else direction
            key = (event.path, event.op, direction)
            names = dict(zip(("layer", "op", "direction"), key, strict=True))
            row = found.setdefault(key, names | {"max_ulp": 0.0, "equal": True})
            row["max_ulp"] = max(row["max_ulp"], event.error.max_ulp)
            row["equal"] = row["equal"] and event.error.equal == 1.0
        for row in found.values():
            row["max_ulp"] = row["max_ulp"] if row["max_ulp"] < float("inf") else None
        return list(found.values())


def trainer_of(bundle: Bundle) -> Callable[[Policy], Trainer]:
    """A maker of trainers that start where the bundle starts."""
    return lambda policy: Trainer(bundle.model, bundle.training, policy, bundle.tokens, bundle.init())


def compare(
    make: Callable[[Policy], Trainer], candidate: Policy, recorded: list[Recorded], steps: int,
    progress: Progress = lambda what, done, total: None,
) -> Located:
    """Run the candidate on the recorded inputs for ``steps`` steps."""
    trainer = make(candidate)
    run = trainer.train(steps)
    done = iter(range(1, len(recorded) + 1))
    with ForcedRun(trainer.model, recorded, lambda: progress("candidate", next(done), len(recorded))) as forced:
        try:
            for step in range(1, steps + 1):
                next(run)
                forced.finish_step(step)
        except Diverged:
            pass
    return Located(forced.events)


def locate(
    make: Callable[[Policy], Trainer], reference: Policy, candidate: Policy, steps: int,
    progress: Progress = lambda what, done, total: None,
) -> Located:
    """Record the reference, then compare the candidate with it."""
    recorded = record(make, reference, candidate, steps, lambda done, total: progress("reference", done, total))
    return compare(make, candidate, recorded, steps, progress)
