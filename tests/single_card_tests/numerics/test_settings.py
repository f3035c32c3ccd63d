"""Numeric choices that are no op: by recipe, by environment, in the table."""

import json
from pathlib import Path

import pytest
import yaml
from reference import ROOT, TINY, tiny_configs
from sft_runs import sft_recipe

from align.bundle import load_bundle
from paddledsv4.cli import main
from paddledsv4.config import TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.settings import SETTINGS, with_environment

VARIABLE = "PADDLEDSV4_INDEXER_LOSS_SCALE"
SILENT = tiny_configs()[1]


def numerics(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["numerics", *arguments])
    captured = capsys.readouterr()
    return captured.out if ended.value.code == 0 else captured.err


def test_the_environment_speaks_where_the_section_is_silent():
    assert with_environment(SILENT, {}).indexer_loss_scale == "megatron"
    assert with_environment(SILENT, {VARIABLE: "per_microbatch"}).indexer_loss_scale == "per_microbatch"
    said = TrainConfig.model_validate(SILENT.model_dump() | {"indexer_loss_scale": "megatron"})
    assert with_environment(said, {VARIABLE: "per_microbatch"}) is said
    with pytest.raises(UserError, match=f"{VARIABLE} = 'half': choose one of: megatron, per_microbatch"):
        with_environment(SILENT, {VARIABLE: "half"})


def test_the_values_are_those_of_the_field():
    for setting in SETTINGS:
        allowed = TrainConfig.model_fields[setting.name].annotation.__args__
        assert set(setting.variants) == set(allowed) and setting.default in allowed


def test_it_is_no_op_and_changes_no_policy():
    assert Policy.from_env(environ={VARIABLE: "per_microbatch"}).choices == Policy.preset().choices
    with pytest.raises(UserError, match=VARIABLE):
        Policy.from_env(environ={"PADDLEDSV4_INDEXER_LOSS_SCALES": "megatron"})


def test_it_has_a_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "→ megatron: 1, as the reference" in numerics(capsys)
    monkeypatch.setenv(VARIABLE, "per_microbatch")
    printed = numerics(capsys)
    assert VARIABLE in printed and "→ per_microbatch: 1 / number of microbatches" in printed
    active = {row["op"]: row["active"] for row in json.loads(numerics(capsys, "--json"))["settings"]}
    assert active == {"indexer_loss_scale": "per_microbatch", "kv_qat": "off", "indexer_qat": "off"}
    monkeypatch.setenv("PADDLEDSV4_KV_QAT", "ue8m0")
    assert "→ ue8m0: e4m3 over blocks of 64" in numerics(capsys)
    assert f"| `{VARIABLE}` | **megatron**" in numerics(capsys, "--markdown")
    monkeypatch.setenv(VARIABLE, "half")
    assert numerics(capsys).startswith(f"error: environment variable {VARIABLE} = 'half'")


EVERY = {"indexer_loss_scale": "per_microbatch", "kv_qat": "fp32_scale", "indexer_qat": "fp4"}


def run(capsys, *words: str) -> dict:
    """The training section in the log of a run that ends well; its folder stands last."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0, capsys.readouterr().err
    return json.loads((Path(words[-1]) / "train.jsonl").read_text().splitlines()[0])["run"]["training"]


def test_bundles_and_recipes_are_trained_with_all_of_them(monkeypatch, tmp_path, capsys):
    assert set(EVERY) == {setting.name for setting in SETTINGS}
    for setting in SETTINGS:
        assert EVERY[setting.name] != setting.default
        monkeypatch.setenv(setting.environment_variable, EVERY[setting.name])
    bundle = load_bundle(str(TINY)).training
    assert {name: getattr(bundle, name) for name in EVERY} == EVERY
    recipe = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    recipe["training"] |= {"sequence_length": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    recipe["data"]["tokens"] = "tokens.bin"
    (tmp_path / "tokens.bin").write_bytes(bytes(200))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["train", "--config", str(tmp_path / "recipe.yaml"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert run(capsys, *words).items() >= EVERY.items()


def test_so_is_fine_tuning(monkeypatch, tmp_path, capsys):
    """Where its recipe is silent; of what it says, nothing changes."""
    path = sft_recipe(tmp_path, training={"kv_qat": "off"})
    recipe = yaml.safe_load(path.read_text())
    for name in EVERY.keys() - {"kv_qat"}:
        del recipe["training"][name]
    path.write_text(yaml.safe_dump(recipe))
    for setting in SETTINGS:
        monkeypatch.setenv(setting.environment_variable, EVERY[setting.name])
    words = ["sft", "--config", str(path), "--steps", "1", "--out", str(tmp_path / "out")]
    assert run(capsys, *words).items() >= (EVERY | {"kv_qat": "off"}).items()
    monkeypatch.setenv(VARIABLE, "half")
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--config", str(path), "--out", str(tmp_path / "other")])
    assert ended.value.code == 2 and f"{VARIABLE} = 'half'" in capsys.readouterr().err
