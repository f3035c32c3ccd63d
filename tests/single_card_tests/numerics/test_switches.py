"""Every switch is real: flipping one op alone changes some bit of a training step, or its variant says why not.

The step is one of a model with every mechanism, as small as it can be while its kernels still round differently.
"""

import functools
import hashlib

import numpy as np
import pytest
from reference import tiny_configs

from paddledsv4.numerics.policy import Policy, installed
from paddledsv4.numerics.registry import load_all
from paddledsv4.training.trainer import Trainer

OPS = load_all()
BASE = "megatron"
TORCH = pytest.mark.skipif(not installed("torch"), reason="the torch variants need paddledsv4[torch]")


def same_bits(op, one: str, other: str) -> bool:
    """Whether the registry says that two variants give the same bits on a CPU: both give those of the base."""
    return all(name == BASE or op.variants[name].same_bits for name in (one, other))


def runnable(op) -> list[str]:
    """The variants that this machine can run; those on torch are skipped by their mark."""
    return [variant.name for variant in op.variants.values() if variant.name == "torch" or not variant.missing()]


def flips() -> list[tuple[str, str, str]]:
    """(preset, op, variant): from the base to every other variant, and from torch to paddle."""
    ops = OPS.values()
    found = [(BASE, op.name, variant) for op in ops for variant in runnable(op) if variant != BASE]
    return found + [("torch", op.name, "paddle") for op in ops]


def marked(flip: tuple[str, str, str]):
    """The flip as a test's parameters, skipped where torch is missing."""
    return pytest.param(*flip, id="-".join(flip), marks=[TORCH] if "torch" in flip else [])


EQUAL = [flip for flip in flips() if same_bits(OPS[flip[1]], flip[0], flip[2])]
DIFFERENT = [flip for flip in flips() if flip not in EQUAL]
STEPS = {"loss_mean": 4, "grad_norm": 4}  # one number a step, which may round alike once or twice


@functools.cache
def unflipped(preset: str, steps: int = 1) -> str:
    """The digest of a preset as it is."""
    return digest(Policy.preset(preset), steps)


def digest(policy: Policy, steps: int = 1) -> str:
    """MD5 of losses, gradient norms, and every parameter, buffer and first moment after the last step."""
    model, train = tiny_configs()
    model = model.replace(
        num_hidden_layers=1, compress_ratios=(4, 0), num_hash_layers=0, sliding_window=8, vocab_size=96,
        hidden_size=64, num_attention_heads=4, index_topk=4, num_experts_per_tok=6, moe_intermediate_size=32,
        hc_sinkhorn_iters=2, n_routed_experts=7,
        rope_scaling=model.rope_scaling.replace(factor=3.0, original_max_position_embeddings=64),
    )  # fmt: skip
    train = train.replace(sequence_length=37, gradient_accumulation_steps=1, steps=1)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, train.sequence_length + 1))
    trainer = Trainer(model, train, policy, tokens)
    md5 = hashlib.md5()
    for result in trainer.train(steps):
        md5.update(repr([(x.main, x.mtp) for x in result.losses] + [result.grad_norm]).encode())
    for _, tensor in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]:
        md5.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    for state in trainer.optimizer.states:
        md5.update(state.m.numpy().tobytes())
    return md5.hexdigest()


@pytest.mark.parametrize(("preset", "op", "variant"), [marked(flip) for flip in DIFFERENT])
def test_a_flip_changes_some_bit(preset, op, variant):
    steps = STEPS.get(op, 1)
    assert digest(Policy.preset(preset, {op: variant}), steps) != unflipped(preset, steps)


@pytest.mark.parametrize(("preset", "variant"), [
    pytest.param(preset, variant, marks=[TORCH] if "torch" in (preset, variant) else [])
    for preset, variant in sorted({(preset, variant) for preset, _, variant in EQUAL})
])  # fmt: skip
def test_flips_that_are_said_to_change_nothing(preset, variant):
    """All of them at once; alone when that changes a bit, to name the wrong ones."""
    claimed = {op: variant for start, op, end in EQUAL if (start, end) == (preset, variant)}
    if digest(Policy.preset(preset, claimed)) != unflipped(preset):
        wrong = [op for op in claimed if digest(Policy.preset(preset, {op: variant})) != unflipped(preset)]
        pytest.fail(f"same_bits is wrong for variant {variant} of {wrong or sorted(claimed)}")


def test_a_step_repeats_its_bits():
    assert digest(Policy.preset(BASE)) == unflipped(BASE)


def test_no_op_is_left_out():
    for op in OPS.values():
        assert {v for p, name, v in EQUAL + DIFFERENT if (p, name) == (BASE, op.name)} == set(runnable(op)) - {BASE}
        assert ("torch", op.name, "paddle") in EQUAL + DIFFERENT
    assert not set(EQUAL) & set(DIFFERENT)
