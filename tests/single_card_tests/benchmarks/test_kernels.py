"""The benchmark of the kernels without a GPU: made-up cases, of which one is wrong, one fails and one rival hangs."""

import json
import subprocess
import sys

import pytest
from reference import ROOT

pytest.importorskip("triton")
pytest.importorskip("torch")

FAKE = """
import sys, time, types
from pathlib import Path
import torch
from benchmarks import kernels
from benchmarks.kernel_case import Case

torch.cuda.get_device_name = lambda: "none"
kernels.copy_rate = kernels.gemm_rate = lambda: 1e12
kernels.milliseconds = lambda run, graph=True: (run(), 1.0)[1]

def absent():
    raise ImportError("no", name="quack")

def broken():
    raise RuntimeError("boom")

def cases(quick):
    rivals = {{"quack": absent, "liger": lambda: lambda: 3, "slow": lambda: lambda: time.sleep(60)}}
    yield Case("right", lambda: 1, "bytes", 8e8, lambda: 1e-4, 1e-3, lambda: 2, rivals, goal=0.75)
    yield Case("wrong", lambda: 1, "bytes", 8e8, lambda: float("nan"), 1e-3, goal=0.75)
    yield Case("broken", broken, "flops", 1, broken, 1)
    yield Case("hangs", lambda: 1, "bytes", 8e8, lambda: 0.0, 1e-3, None, {{"other": lambda: lambda: time.sleep(60)}})

sys.modules["benchmarks.kernels_fake"] = fake = types.ModuleType("fake")
fake.cases = cases
kernels.main("fake", False, {only!r}, Path({out!r}), limit=2, without="fast,slow")
"""


def run(out, only=""):
    return subprocess.run([sys.executable, "-c", FAKE.format(out=str(out), only=only)], capture_output=True, text=True,
                          cwd=ROOT, timeout=60)


def test_what_was_measured_is_kept(tmp_path):
    out = tmp_path / "kernels.json"
    done = run(out)
    assert done.returncode == 1 and "Timeout" in done.stderr
    right, wrong, broken, hangs = json.loads(out.read_text())["cases"]
    assert right["goal"] == "met (75% of the ceiling)" and right["share"] == 0.8
    assert right["peers"] == {"quack": "not carried (quack)", "liger": 1.0, "slow": "left out"}
    assert wrong["goal"] == "" and "nan WRONG" in done.stdout
    assert broken["failure"] == "RuntimeError: boom"
    assert hangs["ms"] == 1.0 and hangs["peers"] == {}


def test_a_family_without_such_a_case_ends_in_order(tmp_path):
    out = tmp_path / "kernels.json"
    done = run(out, only="no such case")
    assert "fake: " in done.stdout and "KeyError" not in done.stderr
    assert json.loads(out.read_text())["cases"] == []
