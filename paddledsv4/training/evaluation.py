"""The loss of rows that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import paddle

from paddledsv4.training.data import Microbatch, Source
from paddledsv4.training.step import StepResult, on_device
from paddledsv4.training.trainer import Trainer
from paddledsv4.transformer.build import AuxiliaryLosses


class Sized(Source, Protocol):
    """A source of which ``len`` rows are all there are."""

    def __len__(self) -> int: ...


@paddle.no_grad()
def evaluate(trainer: Trainer, source: Sized) -> float:
    """The mean main loss over all counted tokens of the source, the same number on every rank.

    Data ranks take turns. Where rows run out some ranks have fewer: these compute on rows that count nothing, so that
    all ranks meet in the same collectives, expert parallelism's too, and none waits for a rank that has finished.
    """
    data, size = trainer.groups.data, trainer.train_config.micro_batch_size
    total = np.zeros(2)
    for first in range(0, len(source), size * data.size):
        batch = _counted(source, first + data.rank * size, size)
        *tensors, documents = on_device(batch, "float32")
        losses = trainer.model.losses(*tensors, AuxiliaryLosses(), documents)
        total += float((losses.main * losses.main_mask).sum()), float(batch.loss_mask.sum())
    loss, count = data.all_reduce_(paddle.to_tensor(total)).tolist()
    return loss / max(count, 1.0)


def _counted(source: Sized, first: int, size: int) -> Microbatch:
    """Rows from ``first`` on, of which those past the end count nothing."""
    last = len(source)
    batch = source.rows(first % last, size)
    mask = np.ones(batch.labels.shape, np.float32) if batch.loss_mask is None else batch.loss_mask.copy()
    mask[max(last - first, 0) :] = 0
    return batch._replace(loss_mask=mask)


def evaluated(
    results: Iterator[StepResult], trainer: Trainer, source: Sized | None, interval: int | None
) -> Iterator[StepResult]:
    """The same results, with an evaluation after every ``interval`` steps and after the last; on all ranks alike."""
    last = trainer.train_config.steps
    for result in results:
        due = source is not None and (result.step == last or (interval and result.step % interval == 0))
        yield replace(result, evaluation=evaluate(trainer, source)) if due else result
