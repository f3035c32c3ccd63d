"""What a bisection found."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from align.bisect.switches import LAYER_RULES, Switches
from align.bisect.trial import Outcome
from paddledsv4.numerics.policy import Policy


class Verdict(str, Enum):
    """How it ended."""

    EQUAL = "equal"  # nothing to attribute: the run is equal as it is
    ATTRIBUTED = "attributed"
    NOT_SWITCHES = "not explained by switches"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Flip:
    """A run with all switches as in ``to`` but this one; ``layer`` is "" for everywhere.

    ``weights_step`` is the first step after which its weights are not those of ``to``; ``seconds`` of CPU time
    are what ``to`` costs more per step than ``from`` at this switch, None where it was not measured.
    """

    name: str
    choices: tuple[str, str]
    outcome: Outcome
    weights_step: int | None = None
    seconds: float | None = None
    layer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As ``align report`` reads it. JSON has no NaN: ``max_loss_difference`` is None, and ``nan`` says so."""
        difference = self.outcome.max_difference
        nan = difference is not None and math.isnan(difference)
        said = {
            "op": self.name, "from": self.choices[0], "to": self.choices[1],
            "first_differing_step": self.outcome.first_step,
            "first_differing_weights_step": self.weights_step,
            "max_loss_difference": None if nan or self.outcome.error else difference,
            "seconds_per_step": self.seconds,
            "nan": nan, "error": self.outcome.error or None,
        }  # fmt: skip
        if self.outcome.first:
            names = ("loss", "step", "microbatch", "rank")
            said["first_difference"] = dict(zip(names, self.outcome.first, strict=True))
        return {"layer": self.layer, **said} if self.layer else said


@dataclass
class Result:
    """``minimal`` is None as long as the smallest set is not known; ``new_runs`` of ``runs`` were made just now."""

    bundle: str
    switches: Switches
    steps: int
    verdict: Verdict = Verdict.UNFINISHED
    before: Outcome | None = None
    after: Outcome | None = None
    flips: list[Flip] = field(default_factory=list)
    layer_flips: list[Flip] = field(default_factory=list)
    minimal: list[str] | None = None
    minimal_for: str = "losses and weights"
    runs: int = 0
    new_runs: int = 0

    @property
    def exit_code(self) -> int:
        """0: full equality is reached, and it is known by which switches. 1: not so."""
        return 0 if self.verdict in (Verdict.EQUAL, Verdict.ATTRIBUTED) else 1

    def as_dict(self) -> dict[str, Any]:
        """bisect.json."""
        switches = self.switches
        return {
            "bundle": self.bundle, "steps": self.steps, "verdict": self.verdict.value,
            "from": _policy(switches.before), "to": _policy(switches.after),
            "switches": [flip.as_dict() for flip in self.flips],
            "layers": [flip.as_dict() for flip in self.layer_flips],
            "minimal_set": self.minimal, "minimal_for": self.minimal_for,
            "switches_that_differ": len(switches.names),
            "runs": self.runs, "new_runs": self.new_runs,
        }  # fmt: skip

    def command(self, bundle: str) -> str:
        """The ``align run`` that flips the smallest set and nothing else."""
        best, base = self.switches.flipped(self.minimal), self.switches.before.name
        usual = Policy.preset(base).choices
        ops = {op: choice for op, choice in best.choices.items() if op in self.minimal or choice != usual[op]}
        words = ["align", "run", bundle, "--numerics", base, "--steps", str(self.steps)]
        if ops:
            words += ["--op", ",".join(f"{op}={variant}" for op, variant in ops.items())]
        if best.layers:
            words += ["--layer-op", ",".join(map(str, best.layers))]
        return shlex.join(words)

    def explain(self, bundle: str) -> list[str]:
        """The verdict in sentences."""
        before, after = self.switches.before.label, self.switches.after.label
        ends = ((before, self.before), (after, self.after))
        lines = [f"{name}: {outcome.text()}" for name, outcome in ends if outcome]
        if self.verdict == Verdict.EQUAL:
            lines.append("The run is equal as it is: no switch has to be flipped.")
        elif self.verdict == Verdict.NOT_SWITCHES:
            lines.append(
                f"Flipping every switch does not give the recorded losses, so the fault is not in a switch from "
                f"{before} to {after}. Find the first operation at fault with: align locate {shlex.quote(bundle)}"
            )
        elif self.verdict == Verdict.UNFINISHED:
            lines.append("The budget is spent. The finished runs are kept; the same command goes on from there.")
        else:
            count = len(self.minimal)
            lines += [
                f"Smallest set for equal {self.minimal_for}, {count} of {len(self.switches.names)} switches: "
                + ", ".join(self.minimal),
                "Taking any one of them out makes a difference. Only these flipped:",
                f"  {self.command(bundle)}",
            ]
        lines.append(f"{self.runs} runs of up to {self.steps} steps, {self.new_runs} of them now")
        return lines


def _policy(policy: Policy) -> dict[str, Any]:
    return {"numerics": policy.label, "fingerprint": policy.fingerprint, LAYER_RULES: list(map(str, policy.layers))}
