"""Training with rounded keys and values: which tensors are rounded, in every preset; off, no bit changes."""

from unittest import mock

import numpy as np
import paddle
import pytest
from layouts import configs
from nan_traps import array
from packed import COMBINATIONS

from paddledsv4.numerics.policy import Policy, installed
from paddledsv4.ops.fake_quantize import FORMATS, fake_quantize
from paddledsv4.training.checkpoint.identity import differences, identity
from paddledsv4.training.trainer import Trainer
from paddledsv4.transformer.documents import PackedDocuments

ON = {"kv_qat": "ue8m0", "indexer_qat": "fp4"}
LENGTH, ROTARY = 32, configs()[0].qk_rope_head_dim


def trainer(preset="paddle", precision="fp32", **settings) -> Trainer:
    """Windows, entries chosen by an indexer, and all entries; a whole block of 64 dimensions and a part of one."""
    shape = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 128, 0), "head_dim": 80 + ROTARY}
    model, train = configs(**shape | {"sequence_length": LENGTH, "gradient_accumulation_steps": 1} | settings)
    if preset == "torch" and not installed("torch"):
        pytest.skip("the torch variants need paddledsv4[torch]")
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (64, train.sequence_length + 1))
    return Trainer(model, train, Policy.preset(preset), tokens, precision=precision)


def trained(*arguments, **settings) -> list[float]:
    """Losses and gradient norms of two steps."""
    results = trainer(*arguments, **settings).train(2)
    return [x for result in results for x in (result.losses[0].main, result.losses[0].mtp, result.grad_norm)]


@pytest.mark.parametrize(("preset", "precision"), COMBINATIONS)
def test_every_preset_trains_with_it(preset, precision):
    if preset == "torch" and not installed("torch"):
        pytest.skip("the torch variants need paddledsv4[torch]")
    with_it, without = trained(preset, precision, **ON), trained(preset, precision)
    assert np.isfinite(with_it).all()
    assert with_it[0] != without[0] and np.allclose(with_it, without, rtol=0.1)


def test_off_changes_no_bit():
    """Not even of a model in which the rounding itself would fail."""
    with mock.patch.dict(FORMATS, clear=True):
        assert trained(kv_qat="off", indexer_qat="off") == trained()


def calls_of(name: str, **settings) -> list[tuple[str, list]]:
    """The path and the arguments of every call of an op in one forward pass."""
    runner, seen = trainer(**settings), []
    for path, layer in runner.model.named_sublayers():
        op = getattr(getattr(layer, "ops", None), name, None)
        if op is not None:
            layer.ops = type(layer.ops)(**vars(layer.ops))
            setattr(layer.ops, name, lambda *a, path=path, op=op, **kw: seen.append((path, a)) or op(*a, **kw))
    runner.model(paddle.to_tensor(np.arange(LENGTH)[None] % 96))
    return seen


def is_rounded(x, name: str, kept: int) -> bool:
    """Whether rounding changes nothing, of the dimensions before the rotary ones."""
    return bool((array(fake_quantize(x.detach(), FORMATS[name], kept=kept)) == array(x)).all())


@pytest.mark.parametrize("name", ["off", "ue8m0", "fp32_scale"])
def test_windows_and_entries_are_rounded_before_attention(name):
    """Whatever the layer; the rotary dimensions are not."""
    calls = calls_of("sparse_attention", kv_qat=name, compress_ratios=(0, 4, 4, 0))
    assert len(calls) == 3
    for path, (query, kv, compressed, *_) in calls:
        assert ("layers.0" in path) == (compressed is None)
        for keys in (kv, *([] if compressed is None else [compressed])):
            if name == "ue8m0":
                assert is_rounded(keys, name, kept=ROTARY) and not is_rounded(keys, name, kept=0)
            if name == "off":
                assert not is_rounded(keys, "ue8m0", kept=ROTARY)
            if name == "fp32_scale":  # at most 2 x 126 + 2 sizes over the largest of a block
                block = array(keys)[..., :64]
                sizes = np.abs(block) / np.abs(block).max(-1, keepdims=True) * 448
                grid = np.exp2(np.floor(np.log2(np.maximum(sizes, 2.0**-6)))) / 8
                np.testing.assert_allclose(sizes / grid, np.round(sizes / grid), atol=1e-4)
        assert not is_rounded(query, "ue8m0", kept=ROTARY)


@pytest.mark.parametrize("name", ["off", "fp4"])
def test_the_indexers_queries_and_keys_are_rounded(name):
    [(_, (query, key, weights))] = calls_of("indexer_score", indexer_qat=name)
    assert is_rounded(query, "fp4", kept=0) == is_rounded(key, "fp4", kept=0) == (name == "fp4")
    assert not is_rounded(weights, "fp4", kept=0)


def test_packed_documents_are_rounded_as_alone():
    """In float64, where only the rounding to FP8 is left of rounding."""
    model = trainer(precision="fp64", **ON).model
    ids = paddle.to_tensor(np.random.default_rng(2).integers(0, 96, (1, LENGTH)))
    with paddle.no_grad():
        packed = model(ids, documents=PackedDocuments([[0, 3, 20, LENGTH]])).numpy()
        alone = [model(ids[:, a:b]).numpy() for a, b in ((0, 3), (3, 20), (20, LENGTH))]
    np.testing.assert_allclose(packed, np.concatenate(alone), 1e-9, 1e-11)


def test_a_checkpoint_knows_it():
    here, there = (identity(trainer(kv_qat=name)) for name in ("off", "ue8m0"))
    assert list(differences(there, here)) == ["training.kv_qat (ue8m0 saved, off here)"]
