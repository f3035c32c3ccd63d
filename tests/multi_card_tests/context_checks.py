"""Checks of context parallelism, run by jobs.py inside the ranks: slices of sequences against whole ones on one card.

Borders of slices cut groups of both ratios. Rank 0 alone computes on whole sequences and compares.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import paddle
from layouts import on_many, on_one_card, trainer

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed import context_parallel
from paddledsv4.distributed.collectives import redistribute
from paddledsv4.distributed.context_parallel import Entries, SequenceSlice
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.errors import UserError
from paddledsv4.moe.dispatcher import SliceDispatcher, local_dispatch
from paddledsv4.numerics.function import differentiable
from paddledsv4.training import gradients
from paddledsv4.training.data import batches
from paddledsv4.training.step import auxiliary_losses, microbatch_gradients
from paddledsv4.transformer.build import ForwardContext

RANKS = int(os.environ["PADDLE_TRAINERS_NUM"])
SHORT = {"compress_ratios": (0, 4, 4), "sequence_length": {2: 38, 4: 36, 8: 40}[RANKS], "micro_batch_size": 2}
LONG = {"compress_ratios": (4, 128, 0), "sequence_length": {2: 138, 4: 140, 8: 136}[RANKS], "micro_batch_size": 1}


def slices_only(groups: Groups) -> tuple[Groups, ParallelConfig]:
    """All ranks share every sequence."""
    world = groups.world
    alone = Group("alone", (world.ranks[world.rank],))
    everyone = replace(ALONE, world=world, replicas=world, context=world, data=alone, expert=alone, expert_data=world)
    return everyone, ParallelConfig(world_size=world.size, context=world.size)


def pairs(groups: Groups, expert: int) -> tuple[Groups, ParallelConfig]:
    """Neighbours share their sequences, and with ``expert`` = 2 the experts too; the pairs are data parallel."""
    world = groups.world
    layout = ParallelConfig(world_size=world.size, data=world.size // 2, context=2, expert=expert)
    found = replace(groups, context=groups.expert, data=groups.expert_data)
    if expert == 1:
        found = replace(found, expert=Group("alone", (world.ranks[world.rank],)), expert_data=world)
    return found, layout


@dataclass
class FirstStep:
    """Losses of every token of the sequence and their means; gradients by name, averaged over the ranks."""

    main: np.ndarray
    mtp: np.ndarray
    means: np.ndarray
    gradients: dict[str, np.ndarray]


def first_step(preset: str, precision: str, groups: Groups = ALONE, parallel: ParallelConfig | None = None, **changes):
    runner = trainer(preset, precision, groups, parallel, **changes)
    rows = batches(runner.source.tokens, 0, 0, 0, runner.train_config, runner.parallel, groups.context.rank)
    inputs, labels = (paddle.to_tensor(x) for x in rows)
    auxiliary = auxiliary_losses(runner.train_config)
    mask = paddle.ones(labels.shape, runner.optimizer.states[0].main_grad.dtype)
    with paddle.no_grad():
        losses = runner.model.losses(inputs, labels, mask, auxiliary)
    means = microbatch_gradients(runner.model, auxiliary, inputs, labels, mask)
    runner.optimizer.accumulate()
    runner.optimizer.gradients.average()
    found = {state.name: state.main_grad.numpy() for state in runner.optimizer.states}
    main, mtp = (groups.context.all_gather(x.t().contiguous()).numpy() for x in (losses.main, losses.mtp[0]))
    means = paddle.stack([mean.astype("float64") for mean in means])
    return FirstStep(main, mtp, groups.context.all_reduce_(means).numpy() / groups.context.size, found)


whole_step = functools.cache(first_step)


def check_redistribute(groups: Groups) -> None:
    """Uneven rows to whoever wants them, some to many, some to none; the gradients are summed where the rows came from.
    """
    group, rank = groups.world, groups.world.rank
    ends = np.cumsum([0, *((r % 3) for r in range(group.size))]).tolist()
    have = list(zip(ends, ends[1:], strict=False))
    want = [(max(first - 2, 0), last) for first, last in have]
    table = paddle.arange(2 * ends[-1], dtype="float64").reshape([-1, 2])
    x = table[have[rank][0] : have[rank][1]]
    x.stop_gradient = False
    y = redistribute(x, group=group, start=have[rank][0], have=have, want=want)
    np.testing.assert_array_equal(y.numpy(), table[want[rank][0] : want[rank][1]].numpy())
    (y * (rank + 1)).sum().backward()
    expected = [sum(r + 1 for r, (first, last) in enumerate(want) if first <= i < last) for i in range(*have[rank])]
    np.testing.assert_array_equal(x.grad.numpy(), np.array(expected, float).reshape([-1, 1]).repeat(2, 1))


# torch's vector kernels leave the last elements of a tensor, fewer than 16 of float32 and 32 of bfloat16, to another
# routine. These slices have whole vectors even of the narrowest activations, with 4 numbers a token.
WHOLE_VECTORS = [
    ("fp32", SHORT | {"micro_batch_size": 4}),
    ("fp32", LONG | {"sequence_length": {2: 136, 4: 144, 8: 160}[RANKS]}),
    ("bf16", SHORT | {"sequence_length": 16 * RANKS, "micro_batch_size": 1}),
]


def check_slices_have_the_log_probabilities_of_the_sequence(groups: Groups) -> None:
    """In the torch preset every bit of them, in the main head's and in MTP's."""
    for precision, shape in WHOLE_VECTORS:
        many = first_step("torch", precision, *slices_only(groups), **shape)
        if groups.world.rank == 0:
            assert largest_difference(whole_step("torch", precision, **shape), many) == 0.0, (precision, shape)


def largest_difference(one: FirstStep, many: FirstStep) -> float:
    return max(np.abs(one.main - many.main).max(), np.abs(one.mtp - many.mtp).max())


def check_losses_and_gradients_of_slices_are_those_of_the_sequence(groups: Groups) -> None:
    """In float64 every gradient. In float32 losses and the gradient as a whole to 1e-6, and each parameter's to 1e-6 of
    its own norm, or 1e-8 of the whole gradient's where it is a sum that cancels."""
    for precision in ("fp32", "fp64"):
        many = first_step("paddle", precision, *slices_only(groups), **LONG)
        if groups.world.rank == 0:
            single = precision == "fp32"
            one = whole_step("paddle", precision, **LONG)
            np.testing.assert_allclose(many.means, one.means, 1e-6 if single else 1e-13)
            assert_close_gradients(one, many, *((1e-6, 1e-8) if single else (1e-9, 1e-13)))
            whole, parts = (np.concatenate([g.ravel() for g in step.gradients.values()]) for step in (one, many))
            assert np.linalg.norm(whole - parts) <= 1e-6 * np.linalg.norm(whole)


def assert_close_gradients(one: FirstStep, many: FirstStep, relative: float, absolute: float) -> None:
    total = np.sqrt(sum(np.square(g, dtype="float64").sum() for g in one.gradients.values()))
    for name, expected in one.gradients.items():
        error, norm = np.linalg.norm(many.gradients[name] - expected), np.linalg.norm(expected)
        assert error <= relative * norm + absolute * total, f"{name}: {error / norm} of {norm / total} of the whole"


def check_slices_with_rounded_caches(groups: Groups) -> None:
    """Keys and values in FP8 and the indexer's in FP4: every bit of the log-probabilities in the torch preset, every
    gradient in float64."""
    rounded = SHORT | {"kv_qat": "ue8m0", "indexer_qat": "fp4"}
    vectors = rounded | {"micro_batch_size": 4}
    bits = first_step("torch", "fp32", *slices_only(groups), **vectors)
    many = first_step("paddle", "fp64", *slices_only(groups), **rounded)
    if groups.world.rank == 0:
        assert largest_difference(whole_step("torch", "fp32", **vectors), bits) == 0.0
        assert largest_difference(whole_step("paddle", "fp64", **SHORT), many) > 1e-6
        assert_close_gradients(whole_step("paddle", "fp64", **rounded), many, 1e-9, 1e-13)


def check_training_on_slices_is_training(groups: Groups) -> None:
    """Slices alone, with data parallelism, and with experts on the ranks that share a sequence: losses, norms, weights
    and expert biases after two steps in float64."""
    size = groups.world.size
    layouts = [(slices_only(groups), 1, "megatron"), (pairs(groups, 1), size // 2, "per_microbatch"),
               (pairs(groups, 2), size // 2, "per_microbatch")]
    for layout, data, scale in layouts:
        changes = SHORT | {"micro_batch_size": 1, "indexer_loss_scale": scale}
        many = on_many(2, "paddle", "fp64", *layout, **changes)
        if groups.world.rank:
            continue
        one = on_one_card(2, "paddle", "fp64", data, **changes)
        np.testing.assert_allclose(many.losses, one.losses, 1e-12)
        np.testing.assert_allclose(many.norms, one.norms, 1e-11)
        for name, value in many.state.items():
            np.testing.assert_allclose(value, one.state[name], 1e-7, 1e-9, err_msg=name)


def check_sequences_that_cannot_be_cut_are_refused(groups: Groups) -> None:
    sliced, layout = slices_only(groups)
    try:
        trainer("paddle", "fp32", sliced, layout, sequence_length=groups.world.size * 8 + 1)
    except UserError as error:
        assert f"must be divisible by parallel.context ({groups.world.size})" in str(error), error
        return
    raise AssertionError("nothing was refused")


@differentiable
def unreduced(x, group, start, have, want):
    """redistribute whose gradient stays where it is."""
    mine, wanted = have[group.rank], want[group.rank]
    first, last = max(mine[0], wanted[0]), min(mine[1], wanted[1])

    def backward(dy):
        dx = paddle.zeros_like(x)
        if first < last:
            dx[first - start : last - start] = dy[first - wanted[0] : last - wanted[0]]
        return (dx,)

    return redistribute.forward_and_backward(x, group, start, have, want)[0], backward


def own_first_token(sequence: SequenceSlice, x: paddle.Tensor) -> paddle.Tensor:
    return paddle.roll(x, -1, 1)


def from_zero(self) -> WrongStart:
    return WrongStart(SequenceSlice(self.group, self.input_ids.shape[1]))


class WrongStart:
    """A slice that gives the ops the offset of the first one, and is right otherwise."""

    start = 0

    def __init__(self, sequence: SequenceSlice):
        self.sequence = sequence

    def __getattr__(self, name: str):
        return getattr(self.sequence, name)


def sum_only(self) -> None:
    for buffer, group in self.buffers:
        group.all_reduce_(buffer)


def first_rows(self, *tables):
    return tuple(table[: self.length] for table in tables)


def without_the_group_before(self, first: int, last: int, overlap: bool) -> tuple[int, int]:
    return min(first, self.whole - 1), max(last, min(first, self.whole - 1) + 1)


PLANTS = {
    "queries of every slice begin at position 0": (ForwardContext, "sequence", property(from_zero)),
    "rotary positions of every slice begin at 0": (SequenceSlice, "local", first_rows),
    "the roll takes the slice's own first token": (SequenceSlice, "roll_left", own_first_token),
    "gradients of what others sent are not reduced": (context_parallel, "redistribute", unreduced),
    "no keys before the slice": (SequenceSlice, "with_previous", lambda self, x, before: x),
    "overlap without the group before": (Entries, "_made", without_the_group_before),
    "mean of the slices' own MTP means": (SequenceSlice, "weight", lambda self, mask: 1.0),
    "balance loss of the slice alone": (SequenceSlice, "elsewhere", lambda self, x: paddle.zeros_like(x)),
    "gradients summed over slices instead of averaged": (gradients.MainGradients, "average", sum_only),
}


def check_planted_bugs_of_slices_are_seen(groups: Groups) -> str | None:
    """Each of them by a gradient in float64."""
    if RANKS > 2:
        return "skipped: seen on two ranks"
    for bug, plant in PLANTS.items():
        with mock.patch.object(*plant):
            many = first_step("paddle", "fp64", *slices_only(groups), **SHORT)
        if groups.world.rank == 0 and same_gradients(whole_step("paddle", "fp64", **SHORT), many):
            raise AssertionError(f"not seen: {bug}")
    return None


def same_gradients(one: FirstStep, many: FirstStep) -> bool:
    try:
        assert_close_gradients(one, many, 1e-9, 1e-13)
    except AssertionError:
        return False
    return True


def as_they_are(self, *arguments):
    return local_dispatch(*arguments)


def check_experts_of_few_rows_have_other_bits(groups: Groups) -> None:
    """Why SliceDispatcher adds rows: without, some log-probabilities differ in the torch preset."""
    few = SHORT | {"sequence_length": 8 * RANKS, "micro_batch_size": 1}
    with mock.patch.object(SliceDispatcher, "__call__", as_they_are):
        many = first_step("torch", "fp32", *slices_only(groups), **few)
    assert groups.world.rank or largest_difference(whole_step("torch", "fp32", **few), many) > 0
