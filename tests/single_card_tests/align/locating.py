"""A model small enough to look for bugs in, with every mechanism, and a search in it."""

from __future__ import annotations

import functools

import numpy as np
from reference import tiny_configs

from align.locate.reference import Recorded, record
from align.locate.run import Located, compare
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer

STEPS = 2


@functools.cache
def configs(precision: str):
    model, train = tiny_configs()
    model = model.replace(
        num_hidden_layers=3, compress_ratios=(4, 128, 0, 4), num_hash_layers=1, sliding_window=8, vocab_size=96,
        hidden_size=64, num_attention_heads=4, head_dim=32, index_topk=4, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=3,
        swiglu_limit=0.05, initializer_range=0.1,
    )  # fmt: skip
    train = train.replace(sequence_length=132, micro_batch_size=1, steps=STEPS, precision=precision)
    rows = train.gradient_accumulation_steps * STEPS
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (rows, train.sequence_length + 1))
    return model, train, tokens


@functools.cache
def initial_state() -> dict[str, np.ndarray]:
    """Weights in which nothing is zero or one: what starts there hides half of the bugs."""
    model = DeepseekV4Model(configs("fp32")[0], Policy.preset("paddle"))
    random = np.random.default_rng(2)
    state = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("local_tokens_per_expert"):
            continue
        value = tensor.numpy()
        if value.dtype.kind == "f":
            spread = 0.1 if value.ndim > 1 else 0.3
            start = value if value.ndim == 1 and not name.endswith("expert_bias") else 0
            value = (start + spread * random.standard_normal(value.shape)).astype(value.dtype)
        state[name] = value
    return state


def make(precision: str):
    model, train, tokens = configs(precision)
    return lambda policy: Trainer(model, train, policy, tokens, initial_state())


@functools.cache
def reference(precision: str, candidate: str) -> list[Recorded]:
    """The clean reference; recorded before any bug is planted."""
    return record(make(precision), Policy.preset("torch"), Policy.preset(candidate), STEPS)


def search(precision: str, candidate: str) -> Located:
    """What locate says of the code as it is now."""
    return compare(make(precision), Policy.preset(candidate), reference(precision, candidate), STEPS)
