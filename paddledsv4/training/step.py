"""One optimizer step: microbatches forward and backward with their loss scales, then the update (spec 1, 10, 13)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.config import TrainConfig
from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.model import DeepseekV4Model
from paddledsv4.moe.router import LearnedRouter
from paddledsv4.training.data import Microbatch
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.transformer.build import AuxiliaryLosses
from paddledsv4.transformer.documents import WHOLE_ROWS, WholeRows, documents_of


@dataclass(frozen=True)
class MicrobatchLoss:
    """Mean losses of one microbatch of one data rank; ``mtp`` is None without MTP layers.

    They are means over whole sequences: ranks that hold slices of them have one record together.
    """

    microbatch: int
    rank: int
    main: float
    mtp: float | None


@dataclass(frozen=True)
class StepResult:
    """What one step did. ``step`` counts from 1; ``seconds`` is wall time; ``tokens`` counts input tokens, padding too.
    ``evaluation``: the mean loss of held-out tokens after the step, if it was taken.
    """

    step: int
    losses: list[MicrobatchLoss]
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens: int
    evaluation: float | None = None


def auxiliary_losses(train: TrainConfig) -> AuxiliaryLosses:
    """The weights of the auxiliary losses under this training configuration."""
    seed = 1.0 / train.gradient_accumulation_steps
    return AuxiliaryLosses(
        mtp_factor=train.mtp_loss_scaling_factor,
        indexer_coeff=train.indexer_loss_coeff,
        indexer_sparse=train.indexer_sparse_loss,
        sequence_coeff=train.seq_aux_loss_coeff,
        seed=seed,
        indexer_seed=seed if train.indexer_loss_scale == "per_microbatch" else 1.0,
    )


def microbatch_losses(
    model: DeepseekV4Model, auxiliary: AuxiliaryLosses, inputs: Tensor, labels: Tensor, loss_mask: Tensor,
    documents: WholeRows = WHOLE_ROWS,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Forward of one microbatch: the main loss and that of every MTP depth to differentiate, and the mean losses.

    The main loss weighs ``seed``, the mean over MTP depths ``mtp_factor * seed``. With context parallelism a loss is a
    mean over this rank's own tokens times what it weighs in the whole: averaged over the ranks, losses and gradients
    are those of the whole sequence.
    """
    losses = model.losses(inputs, labels, loss_mask, auxiliary, documents)
    sequence = SequenceSlice(model.context_group, inputs.shape[1])

    def mean(loss: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        weight = sequence.weight(mask)
        value = model.ops.loss_mean(loss, mask, seed=auxiliary.seed * weight, factor=factor)
        return value, value.detach() * weight

    main, main_value = mean(losses.main, losses.main_mask, 1.0)
    factor = auxiliary.mtp_factor / max(len(losses.mtp), 1)
    mtp = [mean(loss, mask, factor) for loss, mask in zip(losses.mtp, losses.mtp_masks, strict=True)]
    mtp_value = paddle.add_n([value for _, value in mtp]) / len(mtp) if mtp else None
    return [main, *(loss for loss, _ in mtp)], main_value, mtp_value


def microbatch_gradients(
    model: DeepseekV4Model, auxiliary: AuxiliaryLosses, inputs: Tensor, labels: Tensor, loss_mask: Tensor,
    documents: WholeRows = WHOLE_ROWS,
) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of one microbatch. Adds to every parameter's ``grad``; returns the mean losses."""
    losses, main, mtp = microbatch_losses(model, auxiliary, inputs, labels, loss_mask, documents)
    paddle.autograd.backward(losses)
    return main, mtp


def train_step(
    model: DeepseekV4Model,
    optimizer: Optimizer,
    train: TrainConfig,
    step: int,
    microbatch: Callable[[int], tuple[np.ndarray, ...]],
    learning_rate: float,
    groups: Groups = ALONE,
) -> StepResult:
    """Step number ``step`` (from 1). ``microbatch(i)`` gives this rank's microbatch i.

    The result speaks of all ranks: everyone's losses, and the tokens of the global batch.
    """
    start = time.perf_counter()
    auxiliary, records, tokens = auxiliary_losses(train), [], 0
    for index in range(train.gradient_accumulation_steps):
        batch = on_device(Microbatch(*microbatch(index)), optimizer.states[0].main_grad.dtype)
        main, mtp = microbatch_gradients(model, auxiliary, *batch)
        optimizer.accumulate()
        records.append(MicrobatchLoss(index, groups.data.rank, float(main), None if mtp is None else float(mtp)))
        tokens += batch[0].size
    routers = model.learned_routers()
    sum_token_counts(routers, groups.replicas)
    for router in routers:
        router.update_expert_bias(train.expert_bias_update_rate)
    norm = optimizer.step(learning_rate)
    records = gather_losses(records, groups)
    seconds = time.perf_counter() - start
    return StepResult(step, records, norm, learning_rate, seconds, int(tokens) * groups.replicas.size)


def on_device(batch: Microbatch, dtype) -> tuple[Tensor, Tensor, Tensor, WholeRows]:
    """Inputs, labels and mask (of ``dtype``) [b, s], and where documents begin."""
    inputs, labels = (paddle.to_tensor(x, dtype="int64") for x in batch[:2])
    mask = paddle.ones(labels.shape, dtype) if batch.loss_mask is None else paddle.to_tensor(batch.loss_mask, dtype)
    return inputs, labels, mask, documents_of(batch.cu_seqlens)


@paddle.no_grad()
def sum_token_counts(routers: Sequence[LearnedRouter], group: Group) -> None:
    """Tokens per expert of the whole global batch, in every learned router of every rank (spec 9.7)."""
    if group.size == 1 or not routers:
        return
    counts = group.all_reduce_(paddle.stack([router.local_tokens_per_expert for router in routers]))
    for router, total in zip(routers, counts, strict=True):
        paddle.assign(total, router.local_tokens_per_expert)


def gather_losses(records: list[MicrobatchLoss], groups: Groups) -> list[MicrobatchLoss]:
    """The losses of all data ranks, by microbatch, then rank; means over the slices of context ranks."""
    if groups.replicas.size == 1:
        return records
    mine = paddle.to_tensor([[r.main, 0.0 if r.mtp is None else r.mtp] for r in records], "float64")
    everyone = groups.replicas.all_gather(mine).reshape([groups.data.size, groups.context.size, len(records), 2])
    everyone = everyone.mean(1).tolist()
    return [
        replace(record, rank=rank, main=losses[i][0], mtp=None if record.mtp is None else losses[i][1])
        for i, record in enumerate(records)
        for rank, losses in enumerate(everyone)
    ]
