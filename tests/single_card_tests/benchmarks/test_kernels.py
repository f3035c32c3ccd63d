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
    assert apart["beside"] == {"stops": 1.0} and apart["remarks"] == {"stops": "hung, 5 measurements"}
    assert "stops 1.000 ms = 1.00 x (ours 1.000; hung, 5 measurements)" in done.stdout


def test_a_rival_whose_process_fails_is_a_line(out):
    from benchmarks.kernels_rival import Alone, time_alone

    assert time_alone("benchmarks.kernels_fake", "apart", "ends") == Alone("ended with 1 after 0 measurements")


@pytest.mark.parametrize("each, found", [(2, (2.0, 1.0, "hung 3 times, 6 measurements")),
                                         (5, (2.0, 1.0, "hung, 5 measurements")),
                                         (0, ("hung 3 times, 0 measurements", None, ""))])  # fmt: skip
def test_what_processes_that_hang_measured_adds_up(each, found, monkeypatch):
    from benchmarks import kernels_rival

    monkeypatch.setattr(kernels_rival, "_process", lambda _: (1, "Timeout (0:00:04)!", [[1.0, 2.0]] * each))
    assert kernels_rival.time_alone("module", "case", "rival") == found


def test_the_table_has_ratios_to_what_stood_beside(out, capsys):
    """Not to our time in the family's process, on a cooler chip."""
    from benchmarks.kernels_family import Result
    from benchmarks.kernels_table import main

    found = Result("race", 2.0, 3e12, 0.5, "flops", 1e-3, 1e-2, 8.0, {"slow": 4.4, "quack": "left out", "liger": 3.0},
                   {"slow": 2.2}, {"slow": "hung, 5 measurements"}, "met")  # fmt: skip
    out.write_text(json.dumps({"cases": [vars(found), vars(Result("gone", failure="boom"))]}))
    main(out)
    _, _, race, gone = capsys.readouterr().out.splitlines()
    peers = "slow 2.00 x (4.400, ours 2.200 ms; hung, 5 measurements)<br>quack: left out<br>liger 1.50 x"
    assert race == f"| race | 2.000 | 3 TFLOP/s | 50% | 1.0e-03 | 4.00 x | {peers} | met |"
    assert gone == "| gone | failed: boom |  |  |  |  |  |  |"
