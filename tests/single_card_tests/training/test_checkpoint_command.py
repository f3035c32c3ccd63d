"""Checkpoints from the command line: the recipe's section, options, notes, and a log that goes on."""

import json

import numpy as np
import pytest
import yaml
from layouts import configs

from paddledsv4.cli import main
from paddledsv4.training.runlog import RunLog, read_log


@pytest.fixture
def recipe(tmp_path):
    model, training = configs(gradient_accumulation_steps=1, steps=4)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(1).integers(0, 96, (64, 33)))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"}, "numerics": "paddle",
        "checkpoint": {"dir": str(tmp_path / "saved"), "save_interval": 2, "async": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "recipe.yaml"


def run(recipe, *options) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(recipe), *map(str, options)])
    return ended.value.code


def steps(folder) -> list[dict]:
    header, records = read_log(folder / "train.jsonl")
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def test_the_log_of_two_halves_is_that_of_the_whole(recipe, tmp_path, capsys):
    assert run(recipe, "--out", tmp_path / "whole", "--save", tmp_path / "elsewhere") == 0
    assert run(recipe, "--out", tmp_path / "out", "--steps", 3, "--resume", "auto") == 0
    saved = tmp_path / "saved"
    assert f"no checkpoint in {saved} yet: training starts at step 1" in capsys.readouterr().out
    (saved / "latest").write_text("iter_0000002\n")  # as if killed in the third step
    (tmp_path / "out" / "loss.png").unlink()
    assert run(recipe, "--out", tmp_path / "out", "--resume", "auto") == 0
    assert f"resumed after step 2 from {saved / 'iter_0000002'}" in capsys.readouterr().out
    assert steps(tmp_path / "out") == steps(tmp_path / "whole") and len(steps(tmp_path / "out")) == 4
    assert read_log(tmp_path / "out" / "train.jsonl")[0]["resumed_at"] == [2]
    assert (tmp_path / "out" / "loss.png").exists()
    assert {path.name for path in saved.iterdir()} >= {"iter_0000002", "iter_0000004", "latest"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--save-retain-interval", 3], "checkpoint.save_retain_interval = 3: must be a multiple of save_interval (2)"),
        (["--resume", "nowhere"], "nowhere: holds no checkpoint"),
    ],
)
def test_mistakes(recipe, capsys, options, says):
    assert run(recipe, *options) == 2
    captured = capsys.readouterr().err
    assert says in captured and "Traceback" not in captured


def test_auto_looks_in_the_runs_own_folder(recipe, tmp_path, capsys):
    values = yaml.safe_load(recipe.read_text())
    del values["checkpoint"]["dir"]
    recipe.write_text(yaml.safe_dump(values))
    assert run(recipe, "--out", tmp_path / "out", "--steps", 2, "--resume", "auto") == 0
    assert run(recipe, "--out", tmp_path / "out", "--steps", 3, "--resume", "auto") == 0
    assert f"resumed after step 2 from {tmp_path / 'out' / 'checkpoints' / 'iter_0000002'}" in capsys.readouterr().out
    assert run(recipe, "--out", tmp_path / "out", "--steps", 3) == 2
    assert "of another run: go on from it with --resume auto, or choose another --out" in capsys.readouterr().err


def test_a_log_that_was_cut_goes_on_from_its_last_whole_line(tmp_path):
    log = tmp_path / "train.jsonl"
    lines = [{"run": {"numerics": "x"}}, {"step": 1, "main": 2.0, "mtp": None}, {"step": 2, "main": 1.0, "mtp": None}]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "ma')
    resumed = RunLog(tmp_path, {"numerics": "x"}, resumed=2)
    resumed.close()
    assert resumed.last["step"] == 2 and [record["step"] for record in read_log(log)[1]] == [1, 2]
    assert log.read_text().endswith("}\n")
    RunLog(tmp_path, {"numerics": "x"}, resumed=1).close()
    header, records = read_log(log)
    assert header == {"numerics": "x", "resumed_at": [2, 1]} and [record["step"] for record in records] == [1]


def test_a_new_run_begins_a_new_log(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"run": {}}\n{"step": 1}\n')
    RunLog(tmp_path, {"numerics": "y"}).close()
    assert read_log(tmp_path / "train.jsonl") == ({"numerics": "y"}, [])
