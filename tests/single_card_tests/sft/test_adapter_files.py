"""Adapters in files, merged weights, and checkpoints of a run that trains adapters."""

import json
from unittest import mock

import numpy as np
import pytest
from checkpoints import config as saving
from checkpoints import numbers, state_bytes
from packed import trainer
from reference import ROOT
from reference import TINY as CONFIG
from safetensors.numpy import load_file, save_file
from test_cli import run

from paddledsv4.config import LoraConfig
from paddledsv4.config.lora import ATTENTION, EXPERTS, GROUPED
from paddledsv4.errors import UserError
from paddledsv4.sft import merge
from paddledsv4.sft.adapter import CONFIG as ADAPTER_CONFIG
from paddledsv4.sft.adapter import WEIGHTS, SavedAdapter, load_adapter, save_adapter
from paddledsv4.sft.lora import adapters
from paddledsv4.sft.merge import save_merged
from paddledsv4.training.checkpoint.run import checkpointing
from paddledsv4.weights.source import Source

EVERYTHING = LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *EXPERTS, GROUPED])


def trained(packed=True, precision="fp64", lora=EVERYTHING, **changes):
    """Adapters of some size, so that leaving them out would show."""
    runner = trainer("paddle", precision, packed, lora, **changes)
    rng = np.random.default_rng(0)
    for adapter in adapters(runner.model).values():
        adapter.lora_B.set_value(rng.standard_normal(adapter.lora_B.shape).astype(adapter.lora_B.numpy().dtype) * 0.1)
    return runner


def first_loss(runner) -> float:
    return next(runner.train(1)).losses[0].main


def test_what_peft_finds(tmp_path):
    runner = trained(precision="fp32")
    save_adapter(runner.model, EVERYTHING, tmp_path, base="base")
    values = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert values["peft_type"] == "LORA" and values["r"] == 4 and values["lora_alpha"] == 8
    assert values["base_model_name_or_path"] == "base" and set(values["target_modules"]) == {
        *ATTENTION, *EXPERTS, GROUPED}  # fmt: skip
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.decoder.layers.0.mlp.experts.local_experts.3.linear_fc1"
    assert tensors[f"{name}.lora_A.weight"].shape == (4, 64) and tensors[f"{name}.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * len(adapters(runner.model))
    assert all(array.dtype == np.float32 for array in tensors.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == [ADAPTER_CONFIG, WEIGHTS]


def test_there_and_back(tmp_path):
    """Into a model with the same base, the loss is the same to the bit."""
    runner = trained(precision="bf16")
    save_adapter(runner.model, EVERYTHING, tmp_path)
    assert SavedAdapter.read(tmp_path).config == EVERYTHING.replace(
        target_modules=sorted(EVERYTHING.target_modules))  # fmt: skip
    other = trainer("paddle", "bf16", True, EVERYTHING)
    load_adapter(other.model, tmp_path)
    assert first_loss(other) == first_loss(runner)


def spoil(folder, **values):
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lose(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = "base_model.model.decoder.layers.0.self_attention.linear_proj.lora_A.weight"


@pytest.mark.parametrize(("damage", "says"), [
    (lambda f: spoil(f, use_dora=True), "use_dora = True is not supported"),
    (lambda f: spoil(f, r="4"), "lora.r = '4': must be a whole number"),
    (lambda f: spoil(f, lora_alpha=99), "lora_alpha / r is 24.75, the model was given another"),
    (lambda f: lose(f, lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    (lambda f: lose(f, lambda t: t.update(more=t[FIRST])), "has more, which no layer has"),
    (lambda f: lose(f, lambda t: t.update({FIRST: t[FIRST][:2].copy()})), r"has shape \[2, 128\]"),
    (lambda f: (f / WEIGHTS).write_bytes(b"x" * 20), "cannot be read"),
    (lambda f: (f / ADAPTER_CONFIG).unlink(), "cannot be read"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, damage, says):
    runner = trained(precision="fp32")
    save_adapter(runner.model, EVERYTHING, tmp_path)
    before = state_bytes(runner)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        load_adapter(runner.model, tmp_path)
    assert state_bytes(runner) == before


@pytest.mark.parametrize("packed", [True, False])
def test_merged_weights_are_the_adapted_model(tmp_path, packed):
    """In float64, within rounding; and A for B, or a forgotten scale, would be seen."""
    runner = trained(packed)
    save_merged(runner.model, EVERYTHING, tmp_path / "merged")
    expected = first_loss(runner)
    ours = first_loss(trainer("paddle", "fp64", False, weights=tmp_path / "merged"))
    assert ours == pytest.approx(expected, rel=1e-11)
    assert abs(first_loss(trainer("paddle", "fp64", packed)) - expected) > 1e-4
    real = merge.product
    plants = (lambda a, b, *rest: real(a, b, *rest) / EVERYTHING.scale,
              lambda a, b, *rest: real(*swapped(a, b), *rest))  # fmt: skip
    for number, plant in enumerate(plants):
        with mock.patch.object(merge, "product", plant):
            save_merged(runner.model, EVERYTHING, tmp_path / f"{number}")
        wrong = first_loss(trainer("paddle", "fp64", False, weights=tmp_path / f"{number}"))
        assert abs(wrong - expected) > 1e-6


def swapped(a, b):
    """A and B in each other's place, wherever shapes allow it."""
    return (b.T.copy(), a.T.copy()) if a.shape == b.T.shape else (a, b)


def test_merging_a_checkpoint_without_a_model(tmp_path):
    """The command on files gives the bytes of the merged model, also of packed experts and under released names."""
    runner = trained(True, "fp32")
    save_merged(trainer("paddle", "fp32", True, LoraConfig()).model, LoraConfig(), tmp_path / "base")  # B is zero
    save_merged(runner.model, EVERYTHING, tmp_path / "merged")
    save_adapter(runner.model, EVERYTHING, tmp_path / "adapter")
    assert run("convert", tmp_path / "base", tmp_path / "packed", "--to", "released", "--dtype", "released") == 0
    options = ("--adapter", tmp_path / "adapter", "--verify")
    assert run("convert", tmp_path / "base", tmp_path / "ours", "--to", "paddledsv4", *options) == 0
    config = runner.model.config
    with Source.open(tmp_path / "ours", config) as a, Source.open(tmp_path / "merged", config) as b:
        assert a.stored.keys() == b.stored.keys()
        for name in a.stored:
            assert a.read(a.stored[name]).tobytes() == b.read(b.stored[name]).tobytes(), name
    assert run("convert", tmp_path / "packed", tmp_path / "bf16", "--to", "released", *options) == 0
    with Source.open(tmp_path / "bf16", config) as source:
        assert source.stored["layers.0.ffn.experts.3.w1.weight"].dtype == "BF16"
        assert source.stored["mtp.0.e_proj.weight"].dtype == "F8_E4M3"


def test_an_adapter_of_another_model_is_refused(tmp_path, capsys):
    save_adapter(trained(precision="fp32").model, EVERYTHING, tmp_path / "adapter")
    lose(tmp_path / "adapter", lambda t: t.update({FIRST.replace("layers.0", "layers.9"): t[FIRST]}))
    options = ("--config", CONFIG, "--adapter", tmp_path / "adapter")
    assert run("convert", CONFIG / "init.safetensors", tmp_path / "out", "--to", "paddledsv4", *options) == 2
    assert "belongs to no layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def go(runner, folder, source=None, stop=99):
    results = []
    with checkpointing(runner, saving(folder, save_interval=1), source) as (steps, notes):
        for result in steps:
            if result.step > stop:
                break
            results.append(result)
    return results


def test_a_run_resumes_bit_for_bit_and_saves_adapters_alone(tmp_path):
    make = lambda: trained(True, "bf16", steps=4)  # noqa: E731
    whole = make()
    expected = list(whole.train(4))
    go(make(), tmp_path, stop=2)
    names = {e["name"] for e in json.loads((tmp_path / "iter_0000002" / "rank_00000.json").read_text())["tensors"]}
    assert names and all(".lora_" in name for name in names)
    again = make()
    assert numbers(go(again, tmp_path, str(tmp_path))) == numbers(expected[2:])
    assert state_bytes(again) == state_bytes(whole)


def test_another_base_is_refused(tmp_path):
    go(trained(True, "fp32", steps=1), tmp_path)
    for other in ({"lora": EVERYTHING.replace(lora_alpha=9)}, {"initializer_range": 0.03}, {"packed": False}):
        with pytest.raises(UserError, match="was saved by another run"):
            go(trained(**{"packed": True, "precision": "fp32", "steps": 1} | other), tmp_path, str(tmp_path))
    other = trained(True, "fp32", steps=1)
    head = other.model.output_layer.weight
    head.set_value(head + 1.0)
    with pytest.raises(UserError, match="lora.base"):
        go(other, tmp_path, str(tmp_path))


def test_the_command_leaves_the_adapters(tmp_path, capsys):
    text = (ROOT / "configs" / "tiny.yaml").read_text().replace("../align", str(ROOT / "align"))
    recipe = tmp_path / "my.yaml"
    recipe.write_text(text.replace("precision: fp32", "precision: fp32\n  expert_weight_format: mxfp4")
                      + "\nlora: {r: 4, target_modules: all-linear}\n")  # fmt: skip
    assert run("train", "--config", recipe, "--steps", 1, "--out", tmp_path / "run") == 0
    saved = SavedAdapter.read(tmp_path / "run" / "adapter")
    assert saved.config == LoraConfig(r=4, target_modules="all-linear")
    assert any(name.endswith("lora_B.weight") and array.any() for name, array in saved.tensors.items())
