"""Our sources of rows (tokens, packed conversations) as PaddleFormers' Trainer takes its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from paddleformers.trainer import TrainingArguments

from paddledsv4.errors import UserError
from paddledsv4.training.data import Source


class Collator:
    """Numbers of rows -> the microbatch of these rows, padded as our trainer pads it."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Consecutive numbers -> the arguments of the model's forward.

        Raises:
            UserError: they are shuffled; packed conversations are, in another order in every epoch, to begin with.
        """
        first, count = numbers[0], len(numbers)
        if list(numbers) != list(range(first, first + count)):
            raise UserError("TrainingArguments.dataloader_shuffle must be False with rows of ours")
        batch = self.source.rows(first, count)
        arguments = {"input_ids": batch.inputs, "labels": batch.labels}
        if batch.loss_mask is not None:
            arguments["loss_mask"] = np.asarray(batch.loss_mask, np.float32)
        if batch.cu_seqlens is not None:
            arguments["cu_seqlens"] = batch.cu_seqlens
        return arguments


def rows(source: Source, args: TrainingArguments) -> dict[str, Any]:
    """The Trainer's arguments about data: the rows that ``args.max_steps`` steps of our trainer would take."""
    count = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    return {"train_dataset": range(count), "data_collator": Collator(source)}
