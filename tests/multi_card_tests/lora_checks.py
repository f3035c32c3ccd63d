"""Adapters on packed experts that ranks share out: the same run as on one card, one file of adapters, and a resume."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from layouts import configs, seen

from paddledsv4.config import CheckpointConfig, LoraConfig, ParallelConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.numerics.policy import Policy
from paddledsv4.sft.adapter import SavedAdapter, adapter_state, load_adapter, save_adapter
from paddledsv4.training import optimizer
from paddledsv4.training.checkpoint.run import checkpointing
from paddledsv4.training.trainer import Trainer

RANKS = int(os.environ["PADDLE_TRAINERS_NUM"])
LAYOUT = ParallelConfig(world_size=RANKS, data=RANKS, expert=2)
LORA = LoraConfig(r=4)


def trainer(precision: str, groups: Groups = ALONE, steps: int = 3) -> Trainer:
    accumulation = RANKS if groups is ALONE else 1
    model, train = configs(expert_weight_format="mxfp4", gradient_accumulation_steps=accumulation, steps=steps)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (64, train.sequence_length + 1))
    parallel = None if groups is ALONE else LAYOUT
    return Trainer(model, train, Policy.preset("paddle"), tokens, precision=precision, parallel=parallel,
                   groups=groups, lora=LORA)  # fmt: skip


def numbers(results) -> tuple[list, list]:
    results = list(results)
    return [(x.main, x.mtp) for r in results for x in r.losses], [r.grad_norm for r in results]


@functools.cache
def on_one_card():
    runner = trainer("fp64")
    return *numbers(runner.train(3)), adapter_state(runner.model)


def check_lora_on_packed_experts_is_the_same_run(groups: Groups) -> None:
    """In float64 the layout changes the last digits only; every rank gathers the adapters of all experts."""
    losses, norms, adapters = on_one_card()
    runner = trainer("fp64", groups)
    ours = numbers(runner.train(3))
    runner.check_ranks()
    np.testing.assert_allclose(ours[0], losses, 1e-12)
    np.testing.assert_allclose(ours[1], norms, 1e-10)
    gathered = adapter_state(runner.model, groups)
    assert gathered.keys() == adapters.keys() and len(runner.optimizer.states) < len(adapters)
    for name, value in gathered.items():
        np.testing.assert_allclose(value, adapters[name], 1e-7, 1e-9, err_msg=name)


def check_lora_planted_bug_is_seen(groups: Groups) -> None:
    alone = mock.patch.object(optimizer, "total_norm", lambda groups, norms, dtype: np.hypot(*norms))
    seen("norm of this rank's adapters only", alone, lambda: check_lora_on_packed_experts_is_the_same_run(groups))


def check_lora_is_saved_once_and_resumed(groups: Groups) -> None:
    """Two steps in one go, or with a checkpoint between them; then one file for one card."""
    folder = f"{sys.argv[2]}.lora"
    runner = trainer("fp32", groups, steps=2)
    with checkpointing(runner, CheckpointConfig.from_dict({"dir": folder, "save_interval": 1})) as (results, _):
        expected = numbers(results)
    again = trainer("fp32", groups, steps=2)
    with checkpointing(again, CheckpointConfig(), f"{folder}/iter_0000001") as (results, _):
        losses, norms = numbers(results)
    assert losses == expected[0][-len(losses):] and norms == expected[1][1:] and norms
    state = adapter_state(runner.model, groups)
    assert all(np.array_equal(value, state[name]) for name, value in adapter_state(again.model, groups).items())
    save_adapter(runner.model, LORA, Path(f"{folder}.adapter"), groups)
    groups.world.barrier()
    saved = SavedAdapter.read(Path(f"{folder}.adapter")).tensors
    assert saved.keys() == state.keys() and all(np.array_equal(saved[name], state[name]) for name in saved)
    for other in (trainer("fp32"), trainer("fp32", groups)):
        load_adapter(other.model, Path(f"{folder}.adapter"))
    assert all(np.array_equal(value, saved[name]) for name, value in adapter_state(other.model, groups).items())
