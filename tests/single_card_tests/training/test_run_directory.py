"""The folder of a run: what it says, that it is enough to go on from, and what is refused."""

import json
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from checkpoints import read_all
from layouts import configs

from paddledsv4.cli import main
from paddledsv4.training import provenance
from paddledsv4.training import trainer as trainer_module
from paddledsv4.training.checkpoint import resume as resume_module
from paddledsv4.training.checkpoint.record import seal
from paddledsv4.training.run_directory import read_run
from paddledsv4.training.runlog import read_log


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    model, training = configs(gradient_accumulation_steps=1, steps=4)
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 96, (64, 33)))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"}, "checkpoint": {"save_interval": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    layer = "decoder.layers.1.*:rope=plain"
    assert call("train", "--config", recipe, "--run-dir", folder, "--op", "swiglu=plain", "--layer-op", layer) == 0
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """As if killed in the third step, with a line cut; moved, and without the recipe's folder as working directory."""
    folder = Path(shutil.copytree(whole, tmp_path / "moved"))
    (folder / "checkpoints" / "latest").write_text("iter_0000002\n")
    shutil.rmtree(folder / "checkpoints" / "iter_0000004")
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:4]) + lines[4][:25])
    return folder


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def steps(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_log(folder / "train.jsonl")[1]]


def same_weights(one: Path, other: Path) -> bool:
    tensors = [read_all(folder / "checkpoints" / "iter_0000004") for folder in (one, other)]
    return all(tensors[0][name].tobytes() == tensors[1][name].tobytes() for name in tensors[0] | tensors[1])


def test_it_says_what_the_run_was(whole, recipe):
    said = read_run(whole)
    assert said["command"] == "train" and said["recipe"]["model"]["vocab_size"] == 96
    assert said["recipe"]["data"]["tokens"] == str(recipe.parent / "tokens.npy")
    assert said["numerics"]["policy"]["swiglu"] == "plain"
    assert said["numerics"]["policy"]["decoder.layers.1.*:rope"] == "plain"
    assert said["numerics"]["fingerprint"] == read_log(whole / "train.jsonl")[0]["fingerprint"]
    assert said["versions"]["paddlepaddle"] == "3.3.1" and said["variables"]["MKL_CBWR"] == os.environ["MKL_CBWR"]
    assert said["machine"]["host"] and len(said["code"]["sources"]) == 32 and len(said["starts"]) == 1
    assert {path.name for path in whole.iterdir()} == {"run.json", "train.jsonl", "loss.png", "checkpoints"}


def test_resume_needs_the_folder_alone(whole, half, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PADDLEDSV4_NUMERICS", "plain")  # the run's own policy counts
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE", raising=False)  # what chose kernels is set again
    assert call("resume", half) == 0
    said = capsys.readouterr().out
    assert f"resumed after step 2 from {half / 'checkpoints' / 'iter_0000002'}" in said
    assert said.count("\nstep ") == 2  # one line a step
    assert steps(half) == steps(whole) and [record["step"] for record in steps(half)] == [1, 2, 3, 4]
    assert same_weights(whole, half)
    assert [start["after"] for start in read_run(half)["starts"]] == [0, 2]
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "5"


@pytest.mark.parametrize("bug", ["moments", "position"])
def test_the_comparison_can_fail(whole, half, monkeypatch, bug):
    if bug == "moments":
        original = resume_module._copy
        monkeypatch.setattr(
            resume_module, "_copy", lambda piece, *rest: piece.name.startswith("m/") or original(piece, *rest)
        )
    else:
        original = trainer_module.Trainer.go_on_after
        monkeypatch.setattr(trainer_module.Trainer, "go_on_after", lambda self, s, rows: original(self, s, rows + 1))
    assert call("resume", half) == 0
    assert not (steps(half) == steps(whole) and same_weights(whole, half))


def test_without_a_checkpoint_it_begins_again(whole, half):
    shutil.rmtree(half / "checkpoints")
    assert call("resume", half) == 0
    assert steps(half) == steps(whole) and same_weights(whole, half)


def edited(folder: Path, change) -> None:
    values = json.loads((folder / "run.json").read_text())
    del values["md5"]
    change(values)
    (folder / "run.json").write_text(json.dumps(seal(values)))


def no_run(folder):
    (folder / "run.json").unlink()


def cut_run(folder):
    (folder / "run.json").write_bytes((folder / "run.json").read_bytes()[:-300])


def other_number(folder):
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.002'))


REFUSED = {
    "no run": (no_run, "is not the folder of a run: it has no run.json"),
    "cut": (cut_run, "run.json: is damaged: it is not JSON"),
    "another learning rate": (other_number, "run.json: is damaged: its MD5 is not the recorded one"),
    "a newer format": (lambda f: edited(f, lambda v: v.update(format=9)), "has format 9; this version reads format 1"),
    "an unknown command": (lambda f: edited(f, lambda v: v.update(command="rm")), "command = 'rm': must be one of"),
    "an unknown field": (lambda f: edited(f, lambda v: v["recipe"].update(x=1)), "run.json: x is not a known key"),
    "other ops": (lambda f: edited(f, lambda v: v["numerics"].update(fingerprint="0")), "the ops are others in this"),
    "other code": (
        lambda f: edited(f, lambda v: v["code"].update(sources="0")), "the code of paddledsv4 is another ("),
    "other versions": (
        lambda f: edited(f, lambda v: v["versions"].update(numpy="1.0")), "numpy was 1.0 and is "),
    "other kernels": (
        lambda f: edited(f, lambda v: v["variables"].update(OMP_NUM_THREADS="64")), "OMP_NUM_THREADS was 64 and is 1"),
    "parts are missing": (
        lambda f: edited(f, lambda v: v.pop("numerics")), "run.json: is damaged: numerics: Field required"),
    "other data": (
        lambda f: edited(f, lambda v: v["recipe"]["data"].update(tokens=str(f / "none.npy"))), "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_one_sentence(half, capsys, kind):
    change, says = REFUSED[kind]
    change(half)
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert call("resume", half) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("error: ")
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_force_goes_on_and_says_so(half, capsys):
    edited(half, lambda v: v["versions"].update(numpy="1.0"))
    assert call("resume", half, "--force") == 0
    assert "forced, although numpy was 1.0" in capsys.readouterr().err


def test_code_is_every_module_but_the_command_line(tmp_path):
    package = tmp_path / "package"
    (package / "commands").mkdir(parents=True)
    (package / "ops.py").write_text("x = 1\n")
    first = provenance.sources_md5(package)
    (package / "cli.py").write_text("y = 1\n")
    (package / "commands" / "c.py").write_text("y = 1\n")
    assert provenance.sources_md5(package) == first
    (package / "ops.py").write_text("x = 2\n")
    assert provenance.sources_md5(package) != first


def test_git_may_be_absent(tmp_path):
    assert provenance.git_state(tmp_path) == {}
    (tmp_path / ".git").mkdir()
    assert provenance.git_state(tmp_path) == {}
    with mock.patch.object(provenance.subprocess, "run", side_effect=FileNotFoundError):
        assert provenance.git_state(tmp_path) == {}


def test_outside_of_the_main_thread_signals_are_left_alone(recipe, tmp_path):
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(call("train", "--config", recipe, "--steps", 1, "--out", tmp_path / "out"))
    )
    thread.start()
    thread.join()
    assert codes == [0] and len(steps(tmp_path / "out")) == 1
