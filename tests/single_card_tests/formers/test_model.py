"""Our model as a PretrainedModel: the files that it reads and writes, and what forward returns."""

import os

import numpy as np
import paddle
import pytest
from formers_runs import formers_model, our_trainer, settings, state_of
from generated import released
from paddleformers.transformers import AutoModelForCausalLM
from test_cli import run

from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError
from paddledsv4.formers import DeepseekV4ForCausalLM
from paddledsv4.weights.files import read_folder
from paddledsv4.weights.names import tensors


def same(a, b) -> bool:
    a, b = state_of(a), state_of(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def model():
    return formers_model(*settings())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_there_and_back(tmp_path, precision):
    saved = formers_model(*settings(), precision=precision)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert type(loaded) is DeepseekV4ForCausalLM and loaded.config.precision() == precision
    assert same(saved.model, loaded.model)


def test_our_trainer_starts_from_what_it_saves(tmp_path, model):
    model.save_pretrained(tmp_path)
    config, train = settings()
    assert ModelConfig.from_file(tmp_path) == config
    assert set(read_folder(tmp_path)) == set(tensors(config, "paddledsv4"))
    assert same(model.model, our_trainer(config, train.replace(seed=7), weights=tmp_path).model)


def test_it_starts_from_what_our_trainer_saves(tmp_path, model):
    from paddledsv4.weights.save import save_model

    ours = our_trainer(*settings())
    save_model(ours.model, tmp_path / "weights")
    assert same(ours.model, AutoModelForCausalLM.from_pretrained(str(tmp_path / "weights")).model)


def test_a_released_checkpoint(tmp_path):
    """FP8 and FP4 files, DeepSeek's names: the numbers are those of the converted ones."""
    source = released(tmp_path / "released")
    assert run("convert", source, tmp_path / "ours", "--to", "paddledsv4", "--dtype", "bf16") == 0
    loaded = [AutoModelForCausalLM.from_pretrained(str(p), dtype="float32") for p in (source, tmp_path / "ours")]
    assert same(loaded[0].model, loaded[1].model)


def test_saving_again_replaces_all_or_nothing(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path)
    (tmp_path / "training_args.bin").touch()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("paddledsv4.weights.writer.Folder.write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    model.model.output_layer.weight.set_value(model.model.output_layer.weight * 2)
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == set(before)
    assert same(model.model, DeepseekV4ForCausalLM.from_pretrained(tmp_path).model)


def test_logits_and_losses(model):
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 96, (2, 32)))
    logits = model(input_ids=ids).logits
    assert logits.shape == [2, 32, 96]
    output = model(input_ids=ids, labels=ids)
    expected = paddle.nn.functional.cross_entropy(logits, ids)
    assert float(output.loss) == float(output.main_loss) == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(float(output.mtp_loss))


def test_labels_of_minus_100_count_nothing(model):
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 96, (1, 32)))
    labels, mask = ids.clone(), paddle.ones([1, 32])
    labels[:, 20:], mask[:, 20:] = -100, 0
    one, other, all_of_them = (float(model(input_ids=ids, **labelled).loss) for labelled in (
        {"labels": labels}, {"labels": ids, "loss_mask": mask}, {"labels": ids}
    ))  # fmt: skip
    assert one == other != all_of_them


def test_packed_documents(model):
    """The loss of two documents side by side is that of the two alone, weighed by their tokens."""
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 96, (1, 32)))
    packed = float(model(input_ids=ids, labels=ids, cu_seqlens=[np.array([0, 8, 32])]).loss)
    alone = [float(model(input_ids=part, labels=part).loss) for part in (ids[:, :8], ids[:, 8:])]
    assert packed == pytest.approx((8 * alone[0] + 24 * alone[1]) / 32, rel=1e-5)
    assert packed != pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_what_cannot_be_loaded(tmp_path, model):
    with pytest.raises(UserError, match="deepseek-ai/DeepSeek-V4: is no folder with a config.json"):
        DeepseekV4ForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V4")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="numeric is no field of the configuration"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path), numeric="megatron")
    with pytest.raises(UserError, match="missing, which a model of this config has"):
        DeepseekV4ForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3, compress_ratios=[0, 4, 0, 0])


def test_inputs_that_it_would_ignore(model):
    ids = paddle.zeros([1, 8], "int64")
    with pytest.raises(UserError, match="takes no position_ids; documents of one row are given as cu_seqlens"):
        model(input_ids=ids, position_ids=ids)
