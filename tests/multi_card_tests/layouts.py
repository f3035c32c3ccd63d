"""A model with every mechanism that trains in a second, and its training under a layout."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import no_nan  # noqa: F401  (for its effect: NaN passes in no comparison)
import numpy as np
from small_model import configs

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed.connect import join
from paddledsv4.distributed.gloo import GlooBackend, GlooGroup
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.distributed.launch import Launch
from paddledsv4.distributed.topology import rank_groups
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.shards import gather_full


@dataclass
class Trained:
    """Losses by step, microbatch and rank; gradient norms; parameters and biases by name, and the parameters' mean
    gradients (Adam's first moment). Parameters that tensor ranks split are joined."""

    losses: list[tuple[float, float]]
    norms: list[float]
    state: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def trainer(preset: str, precision: str, groups: Groups = ALONE, parallel: ParallelConfig | None = None, **changes):
    model, train = configs(**changes)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (64, train.sequence_length + 1))
    policy = Policy.preset(preset)
    return Trainer(model, train, policy, tokens, precision=precision, parallel=parallel, groups=groups)


def trained(steps: int, *arguments, **changes) -> Trained:
    runner = trainer(*arguments, **changes)
    results = list(runner.train(steps))
    if runner.groups.world.size > 1:
        runner.check_ranks()  # they still share their weights
    losses = [(loss.main, loss.mtp) for result in results for loss in result.losses]
    state = gather_full(named_tensors(runner.model), runner.groups)
    moments = gather_full({state.name: state.m for state in runner.optimizer.states}, runner.groups)
    return Trained(losses, [result.grad_norm for result in results], state, moments)


@functools.cache
def on_one_card(steps: int, preset: str, precision: str, ranks: int, **changes) -> Trained:
    """The same global batches, as so many accumulated microbatches."""
    return trained(steps, preset, precision, gradient_accumulation_steps=ranks, **changes)


def on_many(steps: int, preset: str, precision: str, groups: Groups, parallel: ParallelConfig, **changes) -> Trained:
    return trained(steps, preset, precision, groups, parallel, gradient_accumulation_steps=1, **changes)


def groups_of(parallel: ParallelConfig, world: GlooGroup) -> Groups:
    """The groups of another layout over the processes of ``world``; every rank calls it in the same order."""
    backend = object.__new__(GlooBackend)  # the one that made ``world`` is connected already
    backend.launch, backend.limit, backend.watchdog = Launch.from_env(), timedelta(seconds=60), world.watchdog
    return join(backend, rank_groups(parallel), world.rank)


def seen(bug: str, plant: contextlib.AbstractContextManager, check: Callable[[], None]) -> None:
    """Raise unless ``check`` fails while the bug is planted."""
    with plant:
        try:
            check()
        except (AssertionError, UserError):
            return
    raise RuntimeError(f"not seen: {bug}")
