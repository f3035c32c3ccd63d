"""The scale of the indexer's loss: by recipe, by environment, in the table."""

import json

import pytest
import yaml
from reference import ROOT, TINY, tiny_configs

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
    [row] = json.loads(numerics(capsys, "--json"))["settings"]
    assert row["op"] == "indexer_loss_scale" and row["active"] == "per_microbatch"
    assert f"| `{VARIABLE}` | **megatron**" in numerics(capsys, "--markdown")
    monkeypatch.setenv(VARIABLE, "half")
    assert numerics(capsys).startswith(f"error: environment variable {VARIABLE} = 'half'")


def test_bundles_and_recipes_are_trained_with_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(VARIABLE, "per_microbatch")
    assert load_bundle(str(TINY)).training.indexer_loss_scale == "per_microbatch"
    recipe = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    recipe["training"] |= {"sequence_length": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    recipe["data"]["tokens"] = "tokens.bin"
    (tmp_path / "tokens.bin").write_bytes(bytes(200))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["train", "--config", str(tmp_path / "recipe.yaml"), "--steps", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, capsys.readouterr().err
    header = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert header["run"]["training"]["indexer_loss_scale"] == "per_microbatch"
