"""Starting from a checkpoint: every format gives the same model, and what does not fit is one sentence."""

import json

import numpy as np
import paddle
import pytest
from generated import CONFIG, released, small_config
from reference import TINY, tiny_model
from test_cli import TINY as RECIPE
from test_cli import run

from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.transformer.build import unset_parameters
from paddledsv4.weights import from_checkpoint
from paddledsv4.weights.from_checkpoint import load_checkpoint
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.names import tensors
from paddledsv4.weights.source import Source


def loaded(path, precision: str = "fp32", **changes) -> DeepseekV4Model:
    with unset_parameters():
        model = DeepseekV4Model(small_config(**changes), Policy.preset("paddle"), precision)
    load_checkpoint(model, path)
    return model


def arrays(model) -> dict[str, np.ndarray]:
    return {name: tensor.astype("float64").numpy() for name, tensor in named_tensors(model).items()}


def assert_same(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        assert np.isfinite(array).all() and np.array_equal(array, expected[name]), name


def convert(source, target, *options):
    assert run("convert", source, target, *options) == 0
    return target


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same numbers in every format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    start = released(folder / "released")
    return {
        "released": start,
        "ours": convert(start, folder / "ours", "--to", "paddledsv4"),
        "grouped": convert(start, folder / "grouped", "--to", "megatron"),
        "unpacked": convert(start, folder / "unpacked", "--to", "paddledsv4", "--dtype", "bf16"),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_every_format_gives_the_same_model(checkpoints, precision):
    """FP4 and FP8 numbers, their scales being powers of two, are exact even in bfloat16."""
    expected = {}
    with Source.open(checkpoints["unpacked"], small_config()) as source:
        for name, tensor in tensors(small_config(), "paddledsv4").items():
            values = [source.values(atom).astype(np.float64) for atom in tensor.atoms]
            expected[name] = np.concatenate(values).reshape(tensor.shape)
    for folder in checkpoints.values():
        assert_same(arrays(loaded(folder, precision)), expected)


def test_a_bundles_weights(tmp_path):
    model = loaded(TINY / "init.safetensors")
    assert_same(arrays(model), arrays(tiny_model()))


def test_transformers_weights(checkpoints, tmp_path):
    hf = convert(checkpoints["released"], tmp_path / "hf", "--to", "hf", "--dtype", "bf16", "--without-mtp")
    ratios = small_config().compress_ratios[:-1]
    model = loaded(hf, num_nextn_predict_layers=0, compress_ratios=ratios)
    whole = arrays(loaded(checkpoints["ours"]))
    assert_same(arrays(model), {name: array for name, array in whole.items() if not name.startswith("mtp.")})


def test_without_memory_to_lend_the_result_is_the_same(checkpoints, monkeypatch):
    expected = {precision: arrays(loaded(checkpoints["ours"], precision)) for precision in ("fp32", "bf16")}
    monkeypatch.setattr(from_checkpoint, "_memory", lambda tensor: None)
    for precision, whole in expected.items():
        assert_same(arrays(loaded(checkpoints["ours"], precision)), whole)


def test_models_draw_weights_again_afterwards(checkpoints):
    loaded(checkpoints["ours"])
    paddle.seed(0)
    model = DeepseekV4Model(small_config(), Policy.preset("paddle"))
    assert 0.01 < float(model.embedding.word_embeddings.weight.std()) < 0.03


def test_another_config_is_refused(checkpoints):
    with pytest.raises(UserError, match="shape"):
        loaded(checkpoints["ours"], q_lora_rank=32)
    with pytest.raises(UserError, match="has no place|missing"):
        loaded(checkpoints["ours"], n_routed_experts=4)


def test_train_starts_from_weights(capsys, tmp_path):
    text, losses = RECIPE.read_text().replace("../align/data", str(CONFIG.parent)), []
    convert(CONFIG, tmp_path / "grouped", "--to", "megatron")
    for i, weights in enumerate((None, TINY / "init.safetensors", "grouped")):
        recipe, out = tmp_path / f"{i}.yaml", tmp_path / str(i)
        recipe.write_text(text + (f"weights: {weights}\n" if weights else ""))
        assert run("train", "--config", recipe, "--steps", "1", "--out", out) == 0
        losses.append(json.loads((out / "train.jsonl").read_text().splitlines()[1])["main"])
    assert losses[0] != losses[1] == losses[2]
    recipe.write_text(text + "weights: nowhere\n")
    assert run("train", "--config", recipe, "--steps", "1", "--out", tmp_path / "none") == 2
    assert f"error: {tmp_path / 'nowhere'}: " in capsys.readouterr().err
