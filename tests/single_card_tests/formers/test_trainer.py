"""The same run through our trainer and through PaddleFormers' Trainer."""

import numpy as np
import pytest
from formers_runs import (
    arguments,
    data_set,
    formers_losses,
    formers_model,
    formers_trainer,
    our_losses,
    our_trainer,
    settings,
    state_of,
    table,
)
from paddleformers.trainer import Trainer
from reference import TINY, initial_state, tiny_configs

from paddledsv4.config import OptimizerConfig
from paddledsv4.errors import UserError
from paddledsv4.formers import ExpertBias, optimizers, rows, train_config
from paddledsv4.formers.data import Collator
from paddledsv4.sft.dataset import Document
from paddledsv4.sft.source import PackedSource
from paddledsv4.weights.load import weights_md5

COSINE = OptimizerConfig(lr=1e-3, schedule="cosine", min_lr=1e-4, warmup_steps=3)


def both(tmp_path, model, train, preset="paddle", precision="fp32", state=None, tokens=None, **formers):
    """Losses and final weights of the two."""
    tokens = table(model, train) if tokens is None else tokens
    ours = our_trainer(model, train, preset, precision, tokens=tokens, initial_state=state)
    theirs = formers_model(model, train, preset, precision, state or state_of(ours.model))
    trainer = formers_trainer(theirs, arguments(train, tmp_path), tokens, **formers)
    losses = our_losses(ours), formers_losses(trainer)
    return losses, (ours.weights_md5(), weights_md5(theirs.model)), (state_of(ours.model), state_of(theirs.model))


def equal_states(states) -> bool:
    ours, theirs = states
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_twenty_steps_of_the_reference(tmp_path):
    model, train = tiny_configs()
    train = train.replace(steps=20)
    (ours, theirs), md5s, states = both(
        tmp_path, model, train, state=initial_state(), tokens=np.load(TINY / "tokens.npy")
    )
    assert len(ours) == 40 and ours[0] != ours[-1] and np.isfinite(ours).all()
    assert theirs == ours and md5s[0] == md5s[1] and equal_states(states)


@pytest.mark.parametrize(
    ("preset", "precision", "changes"),
    [
        ("paddle", "fp32", {"optimizer": COSINE}),
        ("paddle", "fp32", {"indexer_loss_scale": "per_microbatch", "gradient_accumulation_steps": 1}),
        ("paddle", "fp32", {"linear_cross_entropy": True}),
        ("megatron", "fp32", {}),
        ("megatron", "fp64", {}),
        ("paddle", "bf16", {}),
    ],
)
def test_the_same_losses_and_weights(tmp_path, preset, precision, changes):
    (ours, theirs), md5s, states = both(tmp_path, *settings(**changes), preset, precision)
    assert np.isfinite(ours).all() and theirs == ours and md5s[0] == md5s[1] and equal_states(states)


def test_three_microbatches_divide_with_a_rounding(tmp_path):
    """We divide every loss by three, the Trainer the sum of the gradients."""
    (ours, theirs), *_ = both(tmp_path, *settings(gradient_accumulation_steps=3, steps=8))
    assert theirs[:3] == ours[:3] and theirs != ours
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_with_paddles_own_optimizer(tmp_path):
    """The first step's losses are equal; then clipping and AdamW round differently, and norms' weights are decayed."""
    (ours, theirs), md5s, _ = both(tmp_path, *settings(), ours=False)
    assert theirs[:2] == ours[:2] and theirs != ours and md5s[0] != md5s[1]
    np.testing.assert_allclose(theirs, ours, rtol=1e-3)


def test_a_planted_difference_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("paddledsv4.formers.trainer.ExpertBias.on_optimizer_begin", lambda *_, **__: None)
    (ours, theirs), md5s, states = both(tmp_path, *settings(steps=4))
    assert md5s[0] != md5s[1] or theirs != ours or not equal_states(states)
    assert not equal_states(states)


def test_the_training_section_of_the_arguments(tmp_path):
    model, train = settings(optimizer=COSINE, clip_grad_norm=0.5)
    built = formers_model(model, train)
    said = train_config(built, arguments(train, tmp_path))
    assert said.replace(sequence_length=train.sequence_length) == train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_and_go_on(tmp_path, precision):
    """The Trainer's checkpoints have weights, masters, moments, expert biases and the schedule."""
    model, train = settings(steps=6, optimizer=COSINE)
    tokens, saving = table(model, train), {"save_checkpoint_format": None, "load_checkpoint_format": None}
    saving |= {"save_strategy": "steps", "save_steps": 3, "save_to_hf": False}
    whole = formers_model(model, train, precision=precision)
    state = state_of(whole.model)
    expected = formers_losses(formers_trainer(whole, arguments(train, tmp_path / "a", **saving), tokens))
    empty = {name: array if name.endswith("tid2eid") else array * 0 for name, array in state.items()}
    other = formers_model(model, train, precision=precision, state=empty)
    trainer = formers_trainer(other, arguments(train, tmp_path / "b", **saving), tokens)
    rest = formers_losses(trainer, str(tmp_path / "a" / "checkpoint-3"))
    assert rest == expected[6:] and equal_states((state_of(whole.model), state_of(other.model)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bf16": True}, "TrainingArguments.bf16 = True: must be False"),
        ({"max_steps": -1}, "TrainingArguments.max_steps must be given"),
        ({"lr_scheduler_type": "polynomial"}, "optimizer.schedule = 'polynomial': must be"),
    ],
)
def test_arguments_that_we_do_not_follow(tmp_path, values, sentence):
    model, train = settings()
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        optimizers(formers_model(model, train), arguments(train, tmp_path, **values))
    assert sentence in str(error.value)


@pytest.mark.parametrize("size", [1, 2])
def test_packed_conversations(tmp_path, size):
    """Rows of ours, padding and document boundaries included, over two epochs."""
    model, train = settings(steps=6, micro_batch_size=size)
    rng = np.random.default_rng(0)
    documents = [Document(i, rng.integers(2, 96, n), rng.random(n) < 0.6) for i, n in enumerate(range(5, 25))]
    source = PackedSource(documents, train.sequence_length, multiple=8)
    assert len(source) < 12 * size
    ours, theirs = our_trainer(model, train, tokens=source), formers_model(model, train)
    args = arguments(train, tmp_path)
    trainer = Trainer(
        model=theirs, args=args, callbacks=[ExpertBias()], optimizers=optimizers(theirs, args), **rows(source, args)
    )
    assert formers_losses(trainer) == our_losses(ours)


def test_shuffled_rows_are_refused():
    with pytest.raises(UserError, match="dataloader_shuffle must be False"):
        Collator(None)([3, 1])


def test_evaluation_changes_nothing(tmp_path):
    model, train = settings(steps=4)
    tokens = table(model, train)
    plain, evaluated = (formers_model(model, train) for _ in range(2))
    evaluated.set_state_dict(plain.state_dict())
    expected = formers_losses(formers_trainer(plain, arguments(train, tmp_path), tokens))
    trainer = formers_trainer(evaluated, arguments(train, tmp_path), tokens, eval_dataset=data_set(tokens[:2]))
    before = trainer.evaluate()["eval_loss"]
    assert formers_losses(trainer) == expected and np.isfinite(before)
