"""Metrics around the steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.config.metrics import MetricsConfig
from paddledsv4.observe.metrics.collect import Collector
from paddledsv4.observe.metrics.log import MetricsLog

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


def with_metrics(
    trainer: Trainer, results: Iterator[StepResult], config: MetricsConfig, folder: Path
) -> Iterator[StepResult]:
    """The same results; rank 0 leaves in ``folder`` what all ranks observe. They themselves, if nothing is asked for.

    Held-out losses are metrics as well, of whatever step they were taken after.
    """
    if not config.formats:
        return results
    collector = Collector(trainer, config.every)
    trainer.observers.append(collector)
    if trainer.groups.world.rank > 0:
        return results
    return _logged(results, collector, MetricsLog(folder, config.formats, trainer.optimizer.step_count or None))


def _logged(results: Iterator[StepResult], collector: Collector, log: MetricsLog) -> Iterator[StepResult]:
    with contextlib.closing(log):
        for result in results:
            values = dict(collector.values) if collector.step == result.step else {}
            if result.evaluation is not None:
                values["loss/held_out"] = result.evaluation
            if values:
                log.write(result.step, values)
            yield result
