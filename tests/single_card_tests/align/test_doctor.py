"""The doctor names each planted difference and its remedy, and the fingerprint notices other kernels."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import SHIPPED, make_bundle
from typer.testing import CliRunner

from align.cli import app
from align.doctor import here as looking
from align.doctor.checks import diagnose

ROOT = Path(__file__).resolve().parents[3]
PINS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
HERE = {
    "environment": PINS, "python": "3.11", "paddle": "3.3.1", "processor": "P", "features": ["avx2"],
    "torch": "2.13.0+cpu", "cpu_capability": "AVX2", "threads": 1, "kernels": {"exp": "a", "sum": "b"},
}  # fmt: skip
SOURCE = {
    "torch": "2.13.0", "environment": PINS,
    "kernel_fingerprint": {key: HERE[key] for key in ("processor", "features", "torch", "cpu_capability", "threads",
                                                      "kernels")},
}  # fmt: skip


def with_change(said, *path, value):
    said = copy.deepcopy(said)
    inner = said
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return said


def test_nothing_differs():
    found = diagnose(SOURCE, HERE, "b")
    assert found.ok and found.fixes == []
    assert found.verdict == "a bitwise match can be expected here: align run b --numerics torch"


@pytest.mark.parametrize(
    ("path", "value", "fix"),
    [
        (("environment", "ATEN_CPU_CAPABILITY"), "default", "export ATEN_CPU_CAPABILITY=avx2"),
        (("environment", "MKL_CBWR"), None, "export MKL_CBWR=AVX2"),
        (("torch",), "2.12.1", "pip install torch==2.13.0"),
        (("threads",), 8, "export OMP_NUM_THREADS=1"),
        (("cpu_capability",), "AVX512", "export ATEN_CPU_CAPABILITY=avx2"),
        (("kernels", "exp"), "c", None),
        (("problem",), "torch is not installed", "pip install torch==2.13.0"),
        (("problem",), "the kernels end with signal SIGILL", None),
    ],
)
def test_each_difference_is_named(path, value, fix):
    found = diagnose(SOURCE, with_change(HERE, *path, value=value), "b")
    assert not found.ok and found.fixes == ([fix] if fix else [])
    assert [check.name for check in found.checks if check.state == "different"] != []
    assert ("no setting helps" in found.verdict) == (fix is None)


def test_what_decides_no_bits_is_only_told():
    assert diagnose(SOURCE, with_change(HERE, "processor", value="Q"), "b").ok
    assert diagnose(SOURCE, with_change(HERE, "features", value=["avx2", "fma"]), "b").ok


def test_a_variable_that_must_not_be_set():
    source = with_change(SOURCE, "environment", "MKL_CBWR", value=None)
    assert diagnose(source, HERE, "b").fixes == ["unset MKL_CBWR"]


@pytest.mark.parametrize("fingerprint", [None, [], "x", {}, {"kernels": []}, {"kernels": {"other": "a"}}])
def test_bundles_without_a_fingerprint(fingerprint):
    found = diagnose(with_change(SOURCE, "kernel_fingerprint", value=fingerprint), HERE, "b")
    assert found.ok and found.checks[-1].state == "unknown"
    assert not diagnose({**SOURCE, "kernel_fingerprint": fingerprint, "torch": "9.9"}, HERE, "b").ok
    assert diagnose({"environment": 3}, HERE, "b").ok


def doctor(monkeypatch, here, *words):
    monkeypatch.setattr("align.doctor.here.look", lambda: here)
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


def test_command_line(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "b", source=SOURCE)
    result = doctor(monkeypatch, HERE, bundle)
    assert result.exit_code == 0 and "2 of 2 equal" in result.stdout and "can be expected here" in result.stdout
    result = doctor(monkeypatch, with_change(HERE, "kernels", "exp", value="z"), bundle, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1 and not said["match_can_be_expected"]
    assert "1 of 2 differ: exp" in said["checks"][-1]["here"]
    result = doctor(monkeypatch, HERE, tmp_path / "none")
    assert result.exit_code == 2 and result.stderr.startswith("error: ")


def test_a_process_that_dies_is_told(monkeypatch):
    def run(*words, **how):
        return subprocess.CompletedProcess(words, -4, "", "")

    monkeypatch.setattr(looking.subprocess, "run", run)
    said = looking.look()
    assert "SIGILL" in said["problem"] and not diagnose(SOURCE, said, "b").ok


def test_the_shipped_fingerprint_says_where_it_was_taken():
    source = json.loads((ROOT / "align" / "data" / SHIPPED / "bundle.json").read_text())["source"]
    taken = source["kernel_fingerprint"]
    assert "not the machine of the recording" in taken["taken_on"] and len(taken["kernels"]) >= 30


def test_inputs_round():
    """Sums of the inputs are not exact, or the order of a sum could not show."""
    torch = pytest.importorskip("paddledsv4.numerics.torch_kernels").torch
    from align.fingerprint import _numbers, fingerprint

    x = _numbers(torch, (1 << 12,), 1)
    assert x.abs().max() <= 1 and float(x.sum()) != float(x.double().sum()) and len(x.unique()) > 4000
    said = fingerprint(torch)
    assert said == fingerprint(torch) and len(set(said.values())) == len(said)


@pytest.mark.slow
def test_other_kernels_are_noticed():
    words = [sys.executable, "-m", "align", "doctor", SHIPPED, "--json"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["fixes"][0] == "export ATEN_CPU_CAPABILITY=avx2"
