"""Megatron's own losses on 2, 4 and 8 expert-parallel ranks, bit for bit, through `align run --launch`.

The recordings start from the weights and the tokens of tiny-fp32, which ships; so their first steps can be repeated
in every clone. With ../shared the whole recordings are.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import ROOT, environment

from paddledsv4.numerics.policy import installed

pytestmark = pytest.mark.skipif(not installed("torch"), reason="gloo and the torch preset need paddledsv4[torch]")
TINY = ROOT / "align" / "data" / "tiny-fp32"
RECORDED = ROOT / "tests" / "data" / "expert_parallel"
STEPS = {2: 2, 4: 1, 8: 1}


def bundle(folder: Path, ranks: int) -> Path:
    """The first steps of the recording with so many ranks."""
    described = json.loads((TINY / "bundle.json").read_text())
    described["name"] = folder.name
    described["training"]["steps"] = STEPS[ranks]
    described["parallel"] |= {"world_size": ranks, "data": ranks, "expert": ranks}
    folder.mkdir()
    (folder / "bundle.json").write_text(json.dumps(described))
    (folder / "init.safetensors").symlink_to(TINY / "init.safetensors")
    (folder / "losses.jsonl").symlink_to(RECORDED / f"ep{ranks}.jsonl")
    np.save(folder / "tokens.npy", np.load(TINY / "tokens.npy")[: STEPS[ranks] * 2 * ranks * 2])
    return folder


def align_run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "align", "run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)


def matches(done: subprocess.CompletedProcess) -> dict[str, tuple[int, int]]:
    found = re.findall(r"^(main|mtp)_matches=(\d+)/(\d+)$", done.stdout, re.M)
    return {kind: (int(equal), int(of)) for kind, equal, of in found}


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_the_first_steps_have_megatrons_bits(tmp_path, ranks):
    path = bundle(tmp_path / f"ep{ranks}", ranks)
    done = align_run(path, "--numerics", "torch", "--launch", "--out", tmp_path / "out")
    expected = STEPS[ranks] * 2 * ranks
    assert matches(done) == {"main": (expected, expected), "mtp": (expected, expected)}, done.stdout + done.stderr
    assert done.returncode == 0 and f"gradient norms: {STEPS[ranks]} of {STEPS[ranks]} equal" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"losses.jsonl", "ranks"}


def test_without_launch_it_says_how(tmp_path):
    done = align_run(bundle(tmp_path / "ep2", 2), "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr == "error: bundle ep2 was recorded on 2 ranks; add --launch\n"


def test_an_error_of_the_ranks_is_one_line(tmp_path):
    path = bundle(tmp_path / "ep2", 2)
    described = json.loads((path / "bundle.json").read_text())
    described["model"]["moe_intermediate_size"] = 32
    (path / "bundle.json").write_text(json.dumps(described))
    done = align_run(path, "--launch", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "the model config gives" in done.stderr
    assert not (tmp_path / "out" / "losses.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep2-fp32", "ep4-fp32", "ep8-fp32"])
def test_the_whole_recordings(shared, tmp_path, name):
    done = align_run(shared / "reference" / name, "--numerics", "torch", "--launch", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
