"""The command line: exit codes, one-line errors, and that nothing half-written stays."""

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from synthetic import SHIPPED, entry, final_lines, json_lines, loss, make_bundle, write
from test_bundle import MALFORMED
from typer.testing import CliRunner

from align.cli import app

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "align" / "data" / SHIPPED / "losses.jsonl"


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@dataclass
class Loss:
    microbatch: int
    rank: int
    main: float
    mtp: float


class FakeTrainer:
    """Computes what the synthetic logs record, or goes wrong as ``fault`` says."""

    fault = None

    def __init__(self, model, train, policy, tokens, initial_state, precision, parallel, groups):
        assert tokens.shape[1] == train.sequence_length + 1 and precision in ("fp32", "bf16", "fp64")
        assert isinstance(initial_state["weight"], np.ndarray)

    def train(self, steps):
        for step in range(1, steps + 1):
            if self.fault is KeyboardInterrupt and step == 2:
                raise KeyboardInterrupt
            if self.fault == "stop" and step == 2:
                return
            losses = [Loss(m, 0, loss(step, m, 0, "main"), loss(step, m, 0, "mtp")) for m in (0, 1)]
            if self.fault == "nan":
                losses[1].main = float("nan")
            yield types.SimpleNamespace(step=step, grad_norm=1.5, seconds=0.1, tokens=32, losses=losses)

    def weights_md5(self):
        return "0" * 32


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("paddledsv4.training.trainer")
    module.Trainer = type("Trainer", (FakeTrainer,), {})
    monkeypatch.setitem(sys.modules, "paddledsv4.training.trainer", module)
    return module.Trainer


def test_run_matches_and_writes(align, fake, tmp_path):
    make_bundle(tmp_path / "b", steps=12)
    result = align("run", "b", "--numerics", "paddle", "--out", "made/here")
    assert result.exit_code == 0, result.stderr
    assert "main_matches=24/24\nmtp_matches=24/24\nfirst_main_diff=None" in result.stdout
    assert "step 10/12" in result.stderr and "matches 40/40" in result.stderr
    assert "md5=" in result.stdout.splitlines()[-1]
    written = [json.loads(line) for line in (tmp_path / "made/here/losses.jsonl").read_text().splitlines()]
    header = written[0]["run"]
    assert header["policy_fingerprint"] and header["precision"] == "fp32" and header["environment"]
    assert written[1] == entry(1, 0, 0)
    again = align("run", "b", "--numerics", "paddle", "--out", "made/here")
    assert again.exit_code == 0 and len(list((tmp_path / "made/here").iterdir())) == 1
    assert align("compare", "b", "made/here").exit_code == 0


def test_run_some_steps(align, fake, tmp_path):
    make_bundle(tmp_path / "b", steps=5)
    result = align("run", "b", "--numerics", "paddle", "--precision", "fp64", "--steps", 2)
    assert result.exit_code == 0 and "main_matches=4/4" in result.stdout
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / "tiny-fp32-paddle-fp64"]
    assert align("compare", "b", "runs/tiny-fp32-paddle-fp64").exit_code == 1
    assert align("compare", "b", "runs/tiny-fp32-paddle-fp64", "--steps", 2).exit_code == 0


def test_run_trains_in_the_precision_of_the_bundle(align, fake, tmp_path):
    make_bundle(tmp_path / "half", training={"precision": "bf16", "sequence_length": 8, "steps": 2})
    assert align("run", "half", "--numerics", "paddle").exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-paddle-bf16")


@pytest.mark.parametrize(("fault", "matched"), [("stop", "2/4"), ("nan", "2/4")])
def test_run_that_goes_wrong_fails(align, fake, tmp_path, fault, matched):
    make_bundle(tmp_path / "b")
    fake.fault = fault
    result = align("run", "b")
    assert result.exit_code == 1 and f"main_matches={matched}" in result.stdout


def test_interrupt_is_clean(align, fake, tmp_path):
    make_bundle(tmp_path / "b")
    fake.fault = KeyboardInterrupt
    result = align("run", "b")
    assert result.exit_code == 130 and result.stderr.endswith("interrupted: nothing was written\n")
    assert not (tmp_path / "runs").exists()


def assert_one_line_error(result, *says):
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.output and result.stdout == ""
    assert all(text in errors[0] for text in says), errors


@pytest.mark.parametrize("case", MALFORMED)
def test_run_refuses_malformed_bundles(align, fake, tmp_path, case):
    spoil, says = MALFORMED[case]
    spoil(make_bundle(tmp_path / "b"))
    assert_one_line_error(align("run", "b"), says)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_run_refuses_what_it_cannot_do(align, fake, tmp_path):
    make_bundle(tmp_path / "wide", parallel={"world_size": 2, "data": 2, "expert": 2}, steps=1)
    np.save(tmp_path / "wide" / "tokens.npy", np.zeros((8, 9), np.int32))
    assert_one_line_error(align("run", "wide"), "2 ranks", "--launch")
    make_bundle(tmp_path / "b")
    assert_one_line_error(align("run", "b", "--steps", 3), "records steps 1 to 2")
    assert_one_line_error(align("run", "b", "--numerics", "nope"), "nope", "paddle")
    (tmp_path / "file").write_text("")
    assert_one_line_error(align("run", "b", "--out", "file"), "cannot write")
    assert align("run", "b", "--precision", "fp8").exit_code == 2
    assert align("run", "b", "--steps", 0).exit_code == 2


def test_compare_shipped_with_itself(align):
    result = align("compare", SHIPPED, RECORDED)
    assert result.exit_code == 0
    assert result.stdout.endswith(
        "main_matches=200/200\nmtp_matches=200/200\nfirst_main_diff=None\nfirst_mtp_diff=None\n"
        "max_main_abs_diff=0 max_main_ulp=0\nmax_mtp_abs_diff=0 max_mtp_ulp=0\n"
        "step100 main final_loss=1.42426836490631103516 md5=71d8790a48d16c7d66b33003316d5caa\n"
        "step100 mtp final_loss=1.43675458431243896484 md5=cd7a796acf453da5d59ad592b00e9dd1\n"
    )


def test_compare_finds_a_planted_digit(align, tmp_path):
    lines = RECORDED.read_text().splitlines()
    assert "5.76878499984741210938" in lines[6]
    lines[6] = lines[6].replace("5.76878499984741210938", "5.76878499984741310938")
    write(tmp_path / "same.jsonl", lines)
    assert (
        align("compare", SHIPPED, "same.jsonl").exit_code == 0
    )  # the same float32, told with a wrong 16th digit
    lines[6] = lines[6].replace("5.7687849", "5.7687949")
    write(tmp_path / "wrong.jsonl", lines)
    result = align("compare", SHIPPED, "wrong.jsonl")
    assert result.exit_code == 1
    assert "main_matches=199/200\nmtp_matches=200/200\nfirst_main_diff=(3, 0, 0)" in result.stdout


def test_compare_knows_how_many_steps_a_bundle_has(align, tmp_path):
    path = make_bundle(tmp_path / "b", steps=5)
    write(path / "losses.jsonl", json_lines(3))
    write(tmp_path / "cand.jsonl", json_lines(3))
    result = align("compare", "b", "cand.jsonl")
    assert result.exit_code == 1 and "3 steps, but 5 are expected" in result.stdout


def test_compare_text_logs(align, tmp_path):
    write(tmp_path / "megatron.log", final_lines(4, order="mtp-first"))
    write(tmp_path / "paddle.log", final_lines(4))
    assert align("compare", "megatron.log", "paddle.log", "--microbatches", 2).exit_code == 0
    orders = ("--ref-order", "mtp-first", "--cand-order", "main-first")
    result = align("compare", "megatron.log", "paddle.log", "--microbatches", 2, *orders)
    assert result.exit_code == 0 and "main_matches=8/8" in result.stdout and "step4 main" in result.stdout


def test_compare_bad_input(align, tmp_path):
    assert_one_line_error(align("compare", SHIPPED, "nope.jsonl"), "there is no log nope.jsonl")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(align("compare", SHIPPED, "empty"), "no losses.jsonl")
    write(tmp_path / "text.log", ["nothing here"])
    assert_one_line_error(align("compare", "text.log", RECORDED), "text.log has no losses")
    (tmp_path / "binary.log").write_bytes(os.urandom(1 << 16))
    assert align("compare", SHIPPED, "binary.log").exit_code == 1
    (tmp_path / "zeros.log").write_bytes(bytes(1 << 25))
    assert_one_line_error(align("compare", SHIPPED, "zeros.log"), "no log")


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("compare", "--help")])
def test_help_has_examples(align, words):
    result = align(*words)
    assert result.exit_code == 0
    if len(words) > 1:
        assert "Examples:" in result.stdout


def test_compare_does_not_import_paddle():
    code = (
        "import sys; from align.cli import app\n"
        f"try: app(['compare', '{SHIPPED}', '{SHIPPED}'])\n"
        "except SystemExit as end: print('rc', end.code, 'paddle' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("rc 0 False\n"), done.stderr


@pytest.mark.slow
def test_real_training_of_one_step(tmp_path):
    words = ("run", SHIPPED, "--numerics", "paddle", "--steps", "1", "--out", str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-m", "align", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    losses = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()][1:3]
    assert [float(one["main_loss"]) for one in losses] == pytest.approx([6.2556734, 6.2530932], abs=1e-5)
