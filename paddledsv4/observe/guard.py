"""The guard that looks at everything: every result of every op, forward and backward, of every microbatch.

The first number that is not finite is kept with the call that gave it. The step runs to its end, so that no rank
waits for another; then the ranks agree on whose finding came first, that rank writes it as a file, and all stop with
the same sentence, before anybody sees or saves the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.distributed.connect import fail_together
from paddledsv4.errors import UserError
from paddledsv4.observe.finite import described, is_finite, kind
from paddledsv4.observe.flow import Edge, GradientFlow
from paddledsv4.observe.known import variant_name
from paddledsv4.observe.losses import NotFinite
from paddledsv4.observe.ops import OpCall, OpObserver, watch_ops
from paddledsv4.observe.reproduction import Origin, Reproduction
from paddledsv4.observe.steps import StepObserver, attached
from paddledsv4.observe.suspect import (
    Suspect,
    backward_suspect,
    forward_suspect,
    in_place,
    kept,
    results,
)

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer

NEVER = np.iinfo(np.int64).max


@dataclass
class Finding:
    """``order`` counts the events of a step; ranks that run the same program count alike. ``suspects`` has one call, or
    the several whose gradients for one tensor were added."""

    order: int
    microbatch: int
    suspects: list[Suspect]


class FiniteGuard(OpObserver, StepObserver):
    """Watches ``trainer``; a finding becomes a file in ``folder``."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.finding: Finding | None = None
        self.step, self.microbatch, self._order = 0, -1, 0
        self._active = False
        self._copy = None
        self._flow = GradientFlow(self._accepts, self._refused)
        self._names = self._known_tensors()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every step in this block.

        Raises:
            NotFinite: something else went wrong after a number had become infinite or NaN, which comes first.
        """
        try:
            with attached(self.trainer, self), watch_ops(self.trainer.model, self):
                yield
        except UserError:
            raise
        except Exception as error:
            if self.finding is None:
                raise
            raise NotFinite(self._report()) from error
        finally:
            self._flow.end_pass()

    # ---- steps

    def begin_step(self, step: int) -> None:
        self.step, self.microbatch, self._order, self.finding, self._active = step, -1, 0, None, True

    def begin_microbatch(self, index: int) -> None:
        self.microbatch = index
        self._flow.end_pass()

    def end_step(self, result: StepResult) -> None:
        """Every rank calls this at the same point.

        Raises:
            NotFinite: on every rank, if one found something.
        """
        self._active = False
        self._flow.end_pass()
        world = self.trainer.groups.world
        order = self.finding.order if self.finding else NEVER
        orders = world.all_gather(paddle.to_tensor([order], dtype="int64")).tolist()
        first = orders.index(min(orders))
        if orders[first] == NEVER:
            return
        mine = first == world.rank
        try:
            fail_together(world, self._report() if mine else None)
        except UserError as error:
            raise NotFinite(str(error)) from None

    # ---- ops

    def before(self, call: OpCall) -> None:
        looks = self._active and self.finding is None
        self._copy = kept(call, paddle.is_grad_enabled()) if looks and in_place(call.op) else None

    def after(self, call: OpCall, outputs: tuple) -> None:
        self._order += 1
        if not self._active or self.finding:
            return
        for index, x in enumerate(results(call, outputs)):
            if not is_finite(x):
                self._found([forward_suspect(call, self._copy, paddle.is_grad_enabled(), index, x, self._names)])
                return
        self._flow.follow(call, outputs)

    def _accepts(self, gradient: Tensor) -> bool:
        self._order += 1
        return self.finding is not None or is_finite(gradient)

    def _refused(self, edge: Edge, gradient: Tensor) -> None:
        """The first bad gradient: of the tensor of ``edge``."""
        suspects = []
        for taker in edge.suspects():
            index = next(i for i, t in enumerate(taker.inputs()) if t is edge.tensor)
            suspects.append(
                backward_suspect(taker.call, taker.arrived, index, gradient, self._names, edge.tensor)
            )
        if not suspects:  # the code between two ops, or another rank
            maker, index = edge.makers[0]
            copy = kept(maker.call, True, {index: gradient})
            text = (f"the gradient that arrives at result {index} of {maker.call.where}, {kind(gradient)}: "
                    f"{described(gradient)}; no operation gave it, but the code between two, or another rank")
            suspects = [Suspect(copy, maker.call.function, "backward", index, gradient, text, innocent=True)]
        self._found(suspects)

    def _found(self, suspects: list[Suspect]) -> None:
        self.finding = Finding(self._order, self.microbatch, suspects)

    # ---- the finding as a file and a sentence

    def _report(self) -> str:
        """Write the file; the sentence about it."""
        finding = self.finding
        suspect, text = culprit(finding.suspects)
        rank = self.trainer.groups.world.rank
        path = self.folder / f"nonfinite-step{self.step}-rank{rank}.safetensors"
        try:
            self._reproduction(suspect, finding.microbatch, text).write(path)
            where = f"see align repro {path}"
        except UserError as error:
            where = f"its inputs were not kept: {error}"
        at = f"step {self.step}, microbatch {finding.microbatch}"
        return f"{at}: {text}; training stopped before this step is saved; {where}"

    def _reproduction(self, suspect: Suspect, microbatch: int, text: str) -> Reproduction:
        call, trainer = suspect.call, self.trainer
        origin = Origin(
            op=call.op, path=call.path, step=self.step, microbatch=microbatch, rank=trainer.groups.world.rank,
            direction=suspect.direction, variant=variant_name(call.op, suspect.function), precision=trainer.precision,
            found=text, preset=trainer.policy.name, ranks=suspect.ranks, policy=trainer.policy.describe(),
        )  # fmt: skip
        bad = {suspect.index: suspect.bad}
        return Reproduction(call, origin, *((bad, {}) if suspect.direction == "forward" else ({}, bad)))

    def _known_tensors(self) -> dict[int, str]:
        named = [*self.trainer.model.named_parameters(), *self.trainer.model.named_buffers()]
        known = {id(tensor): f"parameter {name}" for name, tensor in named}
        for state in self.trainer.optimizer.states:
            for kind_ in ("master", "main_grad", "m", "v"):
                known.setdefault(id(getattr(state, kind_)), f"{kind_} of {state.name}")
        return known


def culprit(suspects: list[Suspect]) -> tuple[Suspect, str]:
    """The one that gives numbers that are not finite again when it runs alone, and the sentence about it.

    If none does, one that cannot run alone; and if there is none, nobody knows.
    """
    repeated = {True: [], False: [], None: []}
    for suspect in suspects:
        repeated[None if suspect.innocent else suspect.repeats()].append(suspect)
    if known := repeated[True] or repeated[None]:
        return known[0], known[0].text
    first, *others = suspects
    if not others:
        return first, f"{first.text}; run again alone it gives finite numbers"
    where = ", ".join(f"{s.call.path or 'model'}: {s.call.op}" for s in others)
    return first, f"{first.text}; or one of {where} did, on the same tensor; run again alone each gives finite numbers"
