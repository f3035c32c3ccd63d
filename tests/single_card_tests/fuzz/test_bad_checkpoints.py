"""Checkpoints and run directories with anything in them: resumed with the right numbers, or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoints import small, state_bytes, train
from fuzzing import EXAMPLES, VALUES, change, damage, refusal, search
from hypothesis import strategies as st
from layouts import configs

from paddledsv4.cli import main
from paddledsv4.commands import resume as resume_command
from paddledsv4.training.checkpoint.record import digest, seal

SHARD, RANK, RECORD = "rank_00000.safetensors", "rank_00000.json", "checkpoint.json"


@pytest.fixture(scope="module")
def runner():
    return small(steps=2)


@pytest.fixture(scope="module")
def kept(runner, tmp_path_factory):
    """The state after two steps, and the folder with it."""
    folder = tmp_path_factory.mktemp("kept")
    train(runner, folder, save_interval=2)
    return state_bytes(runner), folder


@pytest.fixture
def place(kept, tmp_path):
    """A copy, and what puts it back into order."""
    folder = tmp_path / "run"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept[1], folder, copy_function=shutil.copy)
        return folder

    return fresh


def resume_or_refuse(runner, folder: Path, expected: dict[str, bytes]) -> None:
    """If it resumes, then with the bits that were saved."""
    said = refusal(train, runner, source=str(folder))
    assert said or state_bytes(runner) == expected
    assert said is None or "run" in said


@EXAMPLES
def test_spoilt_files(runner, kept, place, examples):
    def check(spoil, name):
        path = place() / name if name == "latest" else place() / "iter_0000002" / name
        path.write_bytes(spoil(path.read_bytes()))
        resume_or_refuse(runner, path.parent if name == "latest" else path.parents[1], kept[0])

    search(examples, check, damage(), st.sampled_from([SHARD, RANK, RECORD, "latest"]))


@EXAMPLES
def test_missing_and_extra_files(runner, kept, place, examples):
    def check(lost, extra, data):
        folder = place() / "iter_0000002"
        for name in lost:
            (folder / name).unlink()
        for name in extra:
            (folder / name).write_bytes(data)
        said = refusal(train, runner, source=str(folder))
        assert bool(said) == bool(lost) and (said or state_bytes(runner) == kept[0])

    lost = st.sets(st.sampled_from([SHARD, RANK, RECORD]), max_size=2)
    extra = st.sets(st.sampled_from(["rank_00001.json", "rank_00001.safetensors", "notes.txt", ".part", "x.pkl"]))
    search(examples, check, lost, extra, st.binary(max_size=9))


@EXAMPLES
def test_strange_values_under_a_right_digest(runner, kept, place, examples):
    """As from somebody who can seal: it is not enough that the MD5s fit."""
    def check(spoil, which):
        folder = place() / "iter_0000002"
        record, rank = (json.loads((folder / name).read_text()) for name in (RECORD, RANK))
        del record["md5"]
        if which == RANK:
            rank = spoil(rank)
            (folder / RANK).write_text(json.dumps(rank))
            record["files"][RANK] = digest((folder / RANK).read_bytes())
        else:
            record = spoil(record)
        (folder / RECORD).write_text(json.dumps(seal(record)))
        refusal(train, runner, source=str(folder))

    search(examples, check, change(), st.sampled_from([RANK, RECORD]))


# ---- run directories -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, training = configs(gradient_accumulation_steps=1, steps=1)
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 96, (64, 33)))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--op", "rope=plain"])
    return folder / "run"


def go_on(folder: Path, monkeypatch) -> str | None:
    """What `paddledsv4 resume` refuses, in which the training itself does nothing but ask for its policy."""
    kind, _ = resume_command.COMMANDS["train"]
    monkeypatch.setitem(resume_command.COMMANDS, "train", (kind, lambda recipe, policy, resume, force: policy()))
    return refusal(resume_command.resume, folder, steps=None, force=False)


def test_a_whole_run_directory_is_taken(run_folder, monkeypatch):
    assert go_on(run_folder, monkeypatch) is None


@EXAMPLES
def test_spoilt_run_directories(run_folder, tmp_path, monkeypatch, examples):
    whole = (run_folder / "run.json").read_bytes()

    def check(spoil):
        (tmp_path / "run.json").write_bytes(spoil(whole))
        said = go_on(tmp_path, monkeypatch)
        assert said or json.loads((tmp_path / "run.json").read_text()) == json.loads(whole)
        assert said is None or str(tmp_path) in said

    search(examples, check, damage())


@EXAMPLES
def test_strange_run_directories_under_a_right_digest(run_folder, tmp_path, monkeypatch, examples):
    whole = json.loads((run_folder / "run.json").read_text())
    del whole["md5"]

    def check(spoil, value):
        for values in (spoil(whole), value):
            sealed = seal(values) if isinstance(values, dict) else values
            (tmp_path / "run.json").write_text(json.dumps(sealed))
            go_on(tmp_path, monkeypatch)

    search(examples, check, change(), VALUES)
