"""All metrics of a step: what its result says, and what the gauges saw of it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np
import paddle

from paddledsv4.observe.metrics.attention import AttentionShares, IndexerLoss
from paddledsv4.observe.metrics.gauge import Gauge
from paddledsv4.observe.metrics.memory import Memory
from paddledsv4.observe.metrics.mixing import MixingError
from paddledsv4.observe.metrics.routing import ExpertBias, RouterLoad
from paddledsv4.observe.ops import OpCall, OpObserver, watch_ops
from paddledsv4.observe.steps import StepObserver

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer

GAUGES: tuple[type[Gauge], ...] = (RouterLoad, ExpertBias, MixingError, AttentionShares, IndexerLoss, Memory)


class Collector(StepObserver):
    """Watches the steps whose number is a multiple of ``every``; ``values`` are those of the last one, by tag.

    A tag is group/quantity, or group/quantity/layer. All ranks collect, and all get the same values.
    """

    def __init__(self, trainer: Trainer, every: int):
        self.model, self.every = trainer.model, every
        self.gauges = [gauge(trainer.model, trainer.groups) for gauge in GAUGES]
        self.step, self.values = 0, {}
        self._watching = contextlib.ExitStack()
        self._ears: list[_Ear] = []

    def begin_step(self, step: int) -> None:
        if step % self.every:
            return
        self._ears = [_Ear(gauge) for gauge in self.gauges if gauge.op]
        for gauge in self.gauges:
            gauge.begin()
        for ear in self._ears:
            self._watching.enter_context(watch_ops(self.model, ear, {ear.gauge.op}))

    def end_step(self, result: StepResult) -> None:
        if result.step % self.every:
            return
        self._watching.close()
        start = time.perf_counter()
        seen = {tag: x for gauge in self.gauges for tag, x in gauge.values().items()}
        seconds = sum(ear.seconds for ear in self._ears), time.perf_counter() - start
        self.step, self.values = result.step, _of_result(result, *seconds) | seen


class _Ear(OpObserver):
    """Tells a gauge of the calls that it is for, and takes the time that it needs."""

    def __init__(self, gauge: Gauge):
        self.gauge, self.seconds = gauge, 0.0

    def after(self, call: OpCall, outputs: tuple) -> None:
        if call.path in self.gauge.layers and paddle.is_grad_enabled():
            start = time.perf_counter()
            with paddle.no_grad():
                self.gauge.see(call, outputs)
            self.seconds += time.perf_counter() - start


def _of_result(result: StepResult, inside: float, after: float) -> dict[str, float]:
    """``inside``: seconds of the step that collecting took, which its speed is told without; ``after``: those after it.
    """
    mtp = [loss.mtp for loss in result.losses if loss.mtp is not None]
    return {
        "loss/main": float(np.mean([loss.main for loss in result.losses])),
        **({"loss/mtp": float(np.mean(mtp))} if mtp else {}),
        "optimizer/grad_norm": result.grad_norm,
        "optimizer/learning_rate": result.learning_rate,
        "speed/step_seconds": result.seconds - inside,
        "speed/metrics_seconds": inside + after,
        "speed/tokens_per_second": result.tokens / (result.seconds - inside),
    }
