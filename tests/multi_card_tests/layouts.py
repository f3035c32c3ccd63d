"""A model with every mechanism that trains in a second, and its training under a layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from reference import tiny_configs

from paddledsv4.config import ModelConfig, ParallelConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors


@dataclass
class Trained:
    """Losses by step, microbatch and rank; gradient norms; parameters and biases by name."""

    losses: list[tuple[float, float]]
    norms: list[float]
    state: dict[str, np.ndarray]


def configs(**changes):
    """Two layers (one hash, one learned router) and MTP; ``changes`` to the model or the training section."""
    model, train = tiny_configs()
    model = model.replace(
        num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1, sliding_window=8, vocab_size=96,
        hidden_size=64, num_attention_heads=4, index_topk=4, moe_intermediate_size=32, hc_sinkhorn_iters=2,
    )  # fmt: skip
    values = {"sequence_length": 32, "micro_batch_size": 1, "steps": 9, "indexer_loss_scale": "per_microbatch"}
    shape = {name: value for name, value in changes.items() if name in ModelConfig.model_fields}
    return model.replace(**shape), train.replace(**values | {k: v for k, v in changes.items() if k not in shape})


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
    state = {name: tensor.numpy() for name, tensor in named_tensors(runner.model).items()}
    return Trained(losses, [result.grad_norm for result in results], state)


@functools.cache
def on_one_card(steps: int, preset: str, precision: str, ranks: int, **changes) -> Trained:
    """The same global batches, as so many accumulated microbatches."""
    return trained(steps, preset, precision, gradient_accumulation_steps=ranks, **changes)


def on_many(steps: int, preset: str, precision: str, groups: Groups, parallel: ParallelConfig, **changes) -> Trained:
    return trained(steps, preset, precision, groups, parallel, gradient_accumulation_steps=1, **changes)
