"""The benchmark of the kernels without a GPU: made-up cases, of which one is wrong, one fails and two rivals hang, one
of them in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from reference import ROOT

pytest.importorskip("triton")
pytest.importorskip("torch")

FAKE = """
import time
from benchmarks import kernel_timing
from benchmarks.kernel_case import Case

def samples(run, graph=True):
    for _ in range(7):
        run()
        yield 1.0

kernel_timing.samples = samples

def absent():
    raise ImportError("no", name="quack")

def broken():
    raise RuntimeError("boom")

def ends():
    raise SystemExit("out")

def sleeps():
    return lambda: time.sleep(60)

def stops():
    times = iter([0] * 5 + [60])
    return lambda: time.sleep(next(times))

def cases(quick):
    rivals = {"quack": absent, "liger": lambda: lambda: 3, "slow": sleeps}
    yield Case("fake right", lambda: 1, "bytes", 8e8, lambda: 1e-4, 1e-3, lambda: 2, rivals, goal=0.75)
    yield Case("fake wrong", lambda: 1, "bytes", 8e8, lambda: float("nan"), 1e-3, goal=0.75)
    yield Case("fake race", lambda: 1, "bytes", 8e8, lambda: 0.0, 1e-3, None, {"fast": sleeps, "broken": broken,
               "liger": lambda: lambda: 3}, goal=1.0, rival="fastest peer")
    yield Case("fake broken", broken, "flops", 1, broken, 1)
    rivals = {"stops": stops, "quick": lambda: lambda: 3, "ends": ends}
    yield Case("apart", lambda: 1, "bytes", 8e8, lambda: 0.0, 1e-3, None, rivals, frozenset(["stops"]))
    yield Case("fake hangs", lambda: 1, "bytes", 8e8, lambda: 0.0, 1e-3, None, {"other": sleeps})
"""
START = """
from pathlib import Path
import torch
from benchmarks import kernels

torch.cuda.get_device_name = lambda: "none"
kernels.copy_rate = kernels.gemm_rate = lambda: 1e12
kernels.main({family!r}, False, {only!r}, Path({out!r}), limit={limit}, without="fast,slow,ends")
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where the figures go; beside the made-up cases, a family in every process started from here."""
    (tmp_path / "kernels_fake.py").write_text(FAKE)
    (tmp_path / "sitecustomize.py").write_text(f"import benchmarks\nbenchmarks.__path__.append({str(tmp_path)!r})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path / "kernels.json"


def run(out, only, limit=60, family="fake"):
    start = START.format(out=str(out), only=only, limit=limit, family=family)
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_what_was_measured_is_kept(out):
    done = run(out, only="fake", limit=2, family="absent,fake")
    assert done.returncode == 1 and "Timeout" in done.stderr
    absent, right, wrong, race, broken, hangs = json.loads(out.read_text())["cases"]
    assert absent["name"] == "absent" and "No module" in absent["failure"]  # and the next family is measured
    assert right["goal"] == "met (75% of the ceiling)" and right["share"] == 0.8
    assert right["peers"] == {"quack": "not carried (quack)", "liger": 1.0, "slow": "left out"}
    assert wrong["goal"] == "" and "nan WRONG" in done.stdout
    assert race["goal"] == "open: broken failed"
    assert broken["failure"] == "RuntimeError: boom"
    assert hangs["ms"] == 1.0 and hangs["peers"] == {}
    assert "fake: ended with 1 before its last case" in done.stdout


@pytest.mark.slow
def test_a_rival_that_stops_ends_its_own_process_and_what_it_did_counts(out):
    done = run(out, only="apart")
    (apart,) = json.loads(out.read_text())["cases"]
    assert apart["peers"] == {"stops": 1.0, "quick": 1.0, "ends": "left out"}
    assert apart["remarks"] == {"stops": "hung after 5 measurements"} and "(hung after 5" in done.stdout


def test_a_rival_whose_process_fails_is_a_line(out):
    from benchmarks.kernels_rival import time_alone

    assert time_alone("benchmarks.kernels_fake", "apart", "ends") == ("ended with 1 after 0 measurements", "")
