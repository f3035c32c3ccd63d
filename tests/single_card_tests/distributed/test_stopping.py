"""Signals: a run that finishes its step, saves and ends well, and a second signal that ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from layouts import configs

from paddledsv4.distributed import stopping
from paddledsv4.distributed.group import Group
from paddledsv4.distributed.stopping import StopRequest, stop_signals
from paddledsv4.training.checkpoint.directory import Directory
from paddledsv4.training.runlog import read_log

ROOT = Path(__file__).parents[3]

WAITING = """
import ctypes
from paddledsv4.distributed.stopping import stop_signals
with stop_signals():
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)  # C code that goes on after a signal
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
"""


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(number):
    """Also while the main thread never comes back to Python."""
    process = start(WAITING)
    process.send_signal(number)
    time.sleep(0.2 if number == signal.SIGINT else stopping.BURST + 0.5)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == 128 + number and time.monotonic() - sent < 10
    name = signal.Signals(number).name
    assert process.stderr.read().splitlines() == [
        f"{name}: stopping after this step; a second signal stops at once",
        f"{name} again: stopped at once; the last complete checkpoint is whole",
    ]


def test_three_sigterm_in_a_burst_are_one(monkeypatch):
    """Paddle's launcher sends them so. The second request is the one after the burst."""
    ended, clock = [], [100.0]
    monkeypatch.setattr(stopping.os, "_exit", ended.append)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    request = StopRequest()
    for _ in range(3):
        request.receive(signal.SIGTERM)
        clock[0] += 0.2
    assert not ended and request.name == "SIGTERM"
    clock[0] += stopping.BURST
    request.receive(signal.SIGTERM)
    assert ended == [143]
    request.receive(signal.SIGINT)
    assert ended == [143, 130]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals() as request:
        assert not request.agreed(Group())
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while request.name is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert request.name == "SIGINT" and request.agreed(Group())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_one_rank_is_enough():
    """The answer is the greatest of all ranks' flags."""
    class Two(Group):
        def all_reduce_(self, x, op="sum"):
            assert op == "max"
            return x + 1

    assert StopRequest().agreed(Two())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_saves_and_goes_on(tmp_path, number):
    model, training = configs(gradient_accumulation_steps=1, steps=100_000)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(1).integers(0, 96, (64, 33)))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"}, "numerics": "paddle",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    out = tmp_path / "out"
    words = ["-m", "paddledsv4", "train", "--config", tmp_path / "recipe.yaml", "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2 "):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 0, rest
    last = read_log(out / "train.jsonl")[1][-1]["step"]
    assert Directory(out / "checkpoints").complete() == [last] and last < 20
    assert f"stopped by {signal.Signals(number).name} after step {last} of 100000, saved in {out}" in rest
    assert f"paddledsv4 resume {out} goes on" in rest and "Traceback" not in rest
