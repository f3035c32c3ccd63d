"""The command line, as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paddledsv4.cli import main
from paddledsv4.config import ModelConfig
from paddledsv4.info import model_info

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_info_prints_the_total(capsys):
    assert run("info", "--config", ROOT / "configs" / "flash.yaml") == 0
    assert "284,332,230,231" in capsys.readouterr().out


def test_info_json(capsys):
    assert run("info", "--config", TINY, "--json") == 0
    assert json.loads(capsys.readouterr().out) == model_info(ModelConfig.from_file(TINY)).to_dict()


@pytest.mark.parametrize("command", ["train", "info"])
def test_help_has_examples(capsys, command):
    assert run(command, "--help") == 0
    assert f"paddledsv4 {command} --config" in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_2(capsys, tmp_path):
    assert run("info", "--config", tmp_path / "none.yaml") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)\n"


@pytest.mark.parametrize(
    ("replace", "by", "said"),
    [
        ("steps: 100", "stepz: 100", "training.stepz is not a known key; did you mean steps?"),
        ("data:", "parallel: {world_size: 2, data: 2}\ndata:", "parallel.world_size = 2, but 1 process was started"),
        ("../align/data/tiny-fp32/tokens.npy", "nowhere.npy", "there is no such file"),
        ("vocab_size: 512", "vocab_size: 100", "must lie in [0, vocab_size = 100)"),
    ],
)
def test_bad_recipes(capsys, tmp_path, replace, by, said):
    recipe = tmp_path / "recipe.yaml"
    text = TINY.read_text().replace(replace, by)
    recipe.write_text(text.replace("../align", str(ROOT / "align")))
    assert run("train", "--config", recipe) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_help_and_info_do_not_import_paddle():
    code = (
        "import sys\nfrom paddledsv4.cli import main\n"
        f"try: main(['info', '--config', {str(TINY)!r}])\nexcept SystemExit: pass\n"
        "assert not {'paddle', 'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def start_training(out: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "paddledsv4",
        "train",
        "--config",
        str(TINY),
        "--out",
        str(out),
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_leaves_a_log_and_a_picture(tmp_path):
    training = start_training(tmp_path, "--steps", "2")
    output, errors = training.communicate(timeout=300)
    assert training.returncode == 0, errors
    header, *steps = records(tmp_path)
    assert header["run"]["training"]["steps"] == 2
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["main"] == pytest.approx(6.24, abs=0.2)  # ln 512, the loss of guessing
    assert steps[1]["main"] < steps[0]["main"]
    assert {"mtp", "grad_norm", "lr", "tokens_per_second", "microbatches"} <= set(steps[0])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert header["run"]["fingerprint"] in output


@pytest.mark.slow
def test_ctrl_c_keeps_the_log_and_draws_the_picture(tmp_path):
    training = start_training(tmp_path)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and training.poll() is None:
        if (tmp_path / "train.jsonl").exists() and len(
            (tmp_path / "train.jsonl").read_text().splitlines()
        ) > 2:
            break
        time.sleep(0.1)
    training.send_signal(signal.SIGINT)
    output, errors = training.communicate(timeout=100)
    assert training.returncode == 0, errors
    assert "stopped by SIGINT after step" in output and len(records(tmp_path)) >= 3
    assert (tmp_path / "loss.png").exists()
