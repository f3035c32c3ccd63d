"""The plan of a bisection: both ends, one switch at a time, the smallest set, and which layers matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from align.bisect.budget import Budget, BudgetSpent
from align.bisect.layers import calling_layers
from align.bisect.result import Flip, Result, Verdict
from align.bisect.runs import Runs
from align.bisect.search import find_switches
from align.bisect.switches import LAYER_RULES, Switches
from align.bisect.trial import Outcome, Trial
from align.bisect.watch import Watch
from paddledsv4.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What is wanted: ``flips`` of every switch alone, and of the culprits in single ``layers``.

    A set of switches is sought that gives every recorded loss and, if ``weights``, the weights that flipping all
    switches gives after every step. A few rounded losses alone are also hit by chance: in a small model, 3 of 17
    culprits gave the losses of 3 steps, and other weights.
    """

    flips: bool = True
    layers: bool = False
    weights: bool = True


def bisect(trial: Trial, switches: Switches, directory: Path, budget: Budget, watch: Watch, plan: Plan) -> Result:
    """Attribute the divergence of ``switches.before`` from the bundle.

    Every finished run is kept in ``directory``. When the budget is spent, the result is what is known so far.

    Raises:
        UserError: the run with all switches flipped fails, or ``directory`` cannot be written.
    """
    runs = Runs(trial, directory, budget, watch)
    result = Result(
        trial.bundle.name, switches, trial.steps, minimal_for="losses and weights" if plan.weights else "losses"
    )
    try:
        with watch:
            _attribute(Attribution(runs, switches, result, plan))
    except BudgetSpent:
        result.verdict = Verdict.UNFINISHED
    result.runs, result.new_runs = runs.count, runs.new
    return result


@dataclass
class Attribution:
    """The parts of the plan, each of which puts what it learns into ``result``."""

    runs: Runs
    switches: Switches
    result: Result
    plan: Plan

    @property
    def weights(self) -> tuple[str, ...]:
        """Those that a run must give to count as equal."""
        return self.result.after.weights if self.plan.weights else ()

    def ends(self) -> Verdict | None:
        """Run both policies; a verdict if there is nothing to search for."""
        self.runs.watch.phase("both ends", 2)
        self.result.after = self.runs.outcome(self.switches.after, f"all as in {self.switches.after.label}")
        if self.result.after.error:
            raise UserError(f"the run with --to {self.switches.after.label} fails: {self.result.after.error}")
        self.runs.weights = self.result.after.weights
        self.result.before = self.runs.outcome(self.switches.before, f"all as in {self.switches.before.label}")
        if self.result.before.equal:
            return Verdict.EQUAL
        return None if self.result.after.equal else Verdict.NOT_SWITCHES

    def flips(self) -> None:
        """One run per switch."""
        self.runs.watch.phase("one switch at a time", len(self.switches.names))
        for name in self.switches.names:
            outcome = self.runs.outcome(self.switches.all_but(name), f"without {name}")
            self.result.flips.append(self._flip(name, outcome))

    def smallest_set(self) -> None:
        """Search, with what the flips told."""
        self.runs.watch.phase("smallest set", None)
        flips = {
            flip.name: flip.outcome.same(self.weights)
            for flip in self.result.flips
            if not flip.outcome.error  # a failure tells nothing
        }
        found = find_switches(
            self._equal,
            self.switches.names,
            needed=[name for name, same in flips.items() if not same],
            harmless=[name for name, same in flips.items() if same],
        )
        self.result.minimal = [name for name in self.switches.names if name in found]

    def layers(self) -> None:
        """One run per layer that calls a culprit."""
        callers = calling_layers(self.runs.trial, self.switches.after)
        pairs = [
            (op, layer)
            for op in self.result.minimal
            if op != LAYER_RULES
            for layer in callers.get(op, [])
            if layer  # no rule for layers reaches the model itself
        ]
        self.runs.watch.phase("layer by layer", len(pairs))
        for op, layer in pairs:
            outcome = self.runs.outcome(self.switches.all_but_in(layer, op), f"without {op} in {layer}")
            self.result.layer_flips.append(replace(self._flip(op, outcome), layer=layer))

    def _equal(self, flipped: set[str]) -> bool:
        out = [name for name in self.switches.names if name not in flipped]
        few, word = (out, "without") if len(out) <= len(flipped) else (sorted(flipped), "with only")
        what = f"{word} {', '.join(few) or 'none'}" if len(few) <= 4 else f"{word} {len(few)} switches"
        return self.runs.outcome(self.switches.flipped(flipped), what, self.weights).same(self.weights)

    def _flip(self, name: str, outcome: Outcome) -> Flip:
        with_it, without = self.result.after.seconds_per_step, outcome.seconds_per_step
        seconds = None if with_it is None or without is None else with_it - without
        weights_step = outcome.weights_step(self.result.after.weights)
        return Flip(name, self.switches.choices(name), outcome, weights_step, seconds)


def _attribute(parts: Attribution) -> None:
    ended = parts.ends()
    if ended:
        parts.result.verdict = ended
        return
    if parts.plan.flips:
        parts.flips()
    parts.smallest_set()
    if parts.plan.layers:
        parts.layers()
    parts.result.verdict = Verdict.ATTRIBUTED
