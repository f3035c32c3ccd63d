"""One short training run under one policy, judged against the bundle's losses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from align.bundle import Bundle
from align.compare import Comparison, compare_logs
from align.issues import Issues
from align.losslog import LossLog, SeriesBuilder, loss_md5, pack
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.step import StepResult
from paddledsv4.training.trainer import Trainer


class Outcome(BaseModel):
    """What a run did.

    Attributes:
        equal: every loss of the steps that were run equals the recorded one, bit by bit.
        first: kind ("main" or "mtp"), step, microbatch and rank of the first loss that does not.
        max_difference: of any loss; NaN where one is NaN, None where no loss was made.
        weights: MD5 of the parameters after every step.
        seconds_per_step: CPU time of the fastest step after the first, which warms up; None without one. Other
            processes on the machine disturb it less than wall time.
        whole: all steps were run; else the run was stopped at the first difference.
        error: why the run failed, in one line; "" where it did not.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    equal: bool
    first: tuple[str, int, int, int] | None = None
    max_difference: float | None = None
    weights: tuple[str, ...] = ()
    seconds_per_step: float | None = None
    whole: bool = True
    error: str = ""

    @property
    def first_step(self) -> int | None:
        return self.first[1] if self.first else None

    def same(self, weights: tuple[str, ...]) -> bool | None:
        """Whether all losses are equal, and the weights are those given, as far as given; None: stopped too early."""
        if self.error or not self.equal or self.weights_step(weights):
            return False
        return True if self.whole else None

    def weights_step(self, weights: tuple[str, ...]) -> int | None:
        """The first step after which the weights are not those given."""
        return _first_difference(self.weights, weights)

    def text(self, weights: tuple[str, ...] = ()) -> str:
        """In a few words; ``weights`` as for :meth:`same`."""
        if self.error:
            return f"fails: {self.error}"
        if self.equal:
            step = self.weights_step(weights)
            return f"losses equal, weights differ after step {step}" if step else "equal"
        if not self.first:
            return "has losses that the bundle lacks"
        largest = "NaN" if math.isnan(self.max_difference) else f"{self.max_difference:.3g}"
        return "{} loss differs from step {}, microbatch {} on".format(*self.first[:3]) + f", by at most {largest}"


@dataclass
class Trial:
    """Runs the first ``steps`` steps of a bundle; the model starts anew from the recorded weights every time."""

    bundle: Bundle
    steps: int
    precision: str

    def __post_init__(self) -> None:
        self.reference, self.state = self.bundle.losses(), self.bundle.init()

    def run(self, policy: Policy, like: tuple[str, ...] | None = None) -> Outcome:
        """Train with ``policy``; given the weights ``like``, stop after the first step where losses or weights differ.

        Whatever goes wrong while training is part of the outcome.
        """
        results, seconds, weights, comparison, stopped = [], [], [], None, False
        try:
            trainer = self.trainer(policy)
            began = time.process_time()
            for result in trainer.train(steps=self.steps):
                seconds.append(time.process_time() - began)
                results.append(result)
                weights.append(trainer.weights_md5())
                comparison = compare_logs(self.reference, _log(results), result.step)
                if comparison.ok and not math.isfinite(result.grad_norm):  # then so are the weights, whatever their MD5
                    return Outcome(equal=False, error=f"the gradient norm of step {result.step} is {result.grad_norm}")
                if like is not None and (not comparison.ok or _first_difference(weights, like)):
                    stopped = True
                    break
                began = time.process_time()
        except Exception as error:  # a variant may fail in any way; the other switches still count
            return Outcome(equal=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if len(results) < self.steps and not stopped:
            return Outcome(equal=False, error=f"the trainer stopped after {len(results)} steps")
        return Outcome(
            equal=comparison.ok,
            first=_first(comparison),
            max_difference=_max_difference(comparison),
            weights=tuple(weights),
            seconds_per_step=min(seconds[1:], default=None),
            whole=len(results) == self.steps,
        )

    def trainer(self, policy: Policy) -> Trainer:
        """A fresh one."""
        bundle = self.bundle
        return Trainer(bundle.model, bundle.training, policy, bundle.tokens, self.state, self.precision)


def _log(results: list[StepResult]) -> LossLog:
    """What the run has computed so far."""
    builders, issues = {"main": SeriesBuilder(), "mtp": SeriesBuilder()}, Issues("the run")
    for result in results:
        for loss in result.losses:
            for kind, value in (("main", loss.main), ("mtp", loss.mtp)):
                if value is not None:
                    key = pack(result.step, loss.microbatch, loss.rank)
                    builders[kind].add(key, value, bytes.fromhex(loss_md5(value)), 0)
    main, mtp = (builder.build(issues, kind) for kind, builder in builders.items())
    return LossLog("the run", main, mtp)


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> int | None:
    """The first place, from 1, where two lists differ, as far as both go."""
    pairs = zip(ours, theirs, strict=False)
    return next((place for place, (mine, other) in enumerate(pairs, 1) if mine != other), None)


def _first(comparison: Comparison) -> tuple[str, int, int, int] | None:
    """The earliest loss that differs."""
    sides = (("main", comparison.main), ("mtp", comparison.mtp))
    return min(((kind, *side.first_diff) for kind, side in sides if side.first_diff), key=lambda f: f[1:], default=None)


def _max_difference(comparison: Comparison) -> float | None:
    found = [d for d in (comparison.main.max_abs_diff, comparison.mtp.max_abs_diff) if d is not None]
    return float(np.max(found)) if found else None  # numpy's max keeps NaN
