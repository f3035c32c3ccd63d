"""--metrics and --profile on the command line, and the commands that show what they leave."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_cli import TINY, run

from paddledsv4.observe.metrics.plot import PANELS, draw_metrics, layers_of

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0], "num_hash_layers": 1}


@pytest.fixture
def recipe(tmp_path) -> Path:
    values = yaml.safe_load(TINY.read_text())
    values["model"] |= SMALL
    values["training"] |= {"sequence_length": 64, "micro_batch_size": 1, "steps": 4}
    values["data"]["tokens"] = "tokens.bin"
    (np.arange(9000, dtype="<u2") % 512).tofile(tmp_path / "tokens.bin")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def train(recipe: Path, out: Path, *options: str) -> str:
    code = "import sys; from paddledsv4.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", "--config", recipe, "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_leaves_what_was_asked_for_and_it_can_be_shown(recipe, tmp_path, capsys):
    train(recipe, tmp_path / "seen", "--metrics", "jsonl", "--metrics-every", "2", "--profile-steps", "2:3")
    lines = (tmp_path / "seen" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert [p.name for p in (tmp_path / "seen" / "profile").iterdir()] == ["rank0.json"]

    assert run("profile", tmp_path / "seen" / "profile" / "rank0.json", "--json") == 0
    times = json.loads(capsys.readouterr().out)
    assert times["steps"] == 2 and sum(op["forward"] + op["backward"] for op in times["ops"]) < times["milliseconds"]
    assert run("profile", tmp_path / "seen" / "profile" / "rank0.json") == 0
    assert "sparse_attention" in capsys.readouterr().out

    assert run("plot", tmp_path / "seen") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'seen' / 'metrics.png'}\n"
    assert (tmp_path / "seen" / "metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics", "csv"], "observe.metrics.formats.0 = 'csv': must be 'jsonl', 'tensorboard' or 'visualdl'"),
        (["--metrics", ""], "observe.metrics.formats.0 = '': must be"),
        (["--metrics-every", "2"], "--metrics-every goes with --metrics, such as jsonl,tensorboard,visualdl"),
        (["--profile-ranks", "0"], "--profile-ranks goes with --profile-steps, such as 5:8"),
        (["--profile-steps", "3:5"], "observe.profile.steps = '3:5': must lie in 1 to 4, the last step of this run"),
        (["--profile-steps", "2", "--profile-ranks", "1"], "must be below 1, the number of ranks"),
        (["--profile-steps", "2", "--profile-ranks", "0,x"], "must be ranks with commas between them, such as 0,3"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(recipe, tmp_path, capsys, options, said):
    assert run("train", "--config", recipe, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(recipe, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "visualdl" else find(name))
    assert run("train", "--config", recipe, "--out", tmp_path / "out", "--metrics", "jsonl,visualdl") == 2
    assert 'pip install "paddledsv4[visualdl]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [(None, "there is no such file"), ("", "no line of metrics"), ("[1]\n{", "no line of metrics")]
)
def test_plot_refuses_what_is_no_log_of_metrics(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert run("plot", tmp_path) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))


def test_a_page_of_many_layers_and_of_one_number(tmp_path):
    records = [
        {"step": step, **{f"{group}/decoder.layers.{i}": float(i) for panel in PANELS for group in panel.groups
                          for i in range(10)}}
        for step in (1, 2)
    ]  # fmt: skip
    draw_metrics(records, tmp_path / "many.png")
    draw_metrics([{"step": 1, "loss/main": float("nan")}], tmp_path / "one.png")
    assert {p.name for p in tmp_path.iterdir()} == {"many.png", "one.png"}


def test_layers_are_ordered_by_number():
    tags = ["mtp.layers.0", "decoder.layers.10", "decoder.layers.9"]
    records = [{"step": 1, "loss/main": 1.0, **{f"router/entropy/{layer}": 1.0 for layer in tags}}]
    assert layers_of(records) == ["decoder.layers.9", "decoder.layers.10", "mtp.layers.0"]
