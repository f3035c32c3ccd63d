"""`paddledsv4 train` behind paddle.distributed.launch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from ranks import ROOT, environment

from paddledsv4.numerics.policy import installed

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.mark.skipif(not installed("torch"), reason="gloo needs paddledsv4[torch]")
def test_rank_0_logs_the_losses_of_all_ranks(tmp_path):
    recipe = yaml.safe_load(TINY.read_text())
    recipe["parallel"] = {"world_size": 2, "data": 2, "expert": 2}
    recipe["training"] |= {"sequence_length": 128, "micro_batch_size": 1}
    recipe["data"]["tokens"] = "tokens.bin"
    (np.arange(2000, dtype="<u2") % 512).tofile(tmp_path / "tokens.bin")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--devices", "",
        "--log_dir", tmp_path / "ranks", sys.executable, "-m", "paddledsv4", "train",
        "--config", tmp_path / "recipe.yaml", "--steps", "1", "--out", tmp_path / "out",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    header, step = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    assert header["run"]["parallel"]["world_size"] == 2
    assert [(m["microbatch"], m["rank"]) for m in step["microbatches"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({m["main"] for m in step["microbatches"]}) == 4
    assert "1,767,104 parameters, fp32, 2 ranks" in done.stdout
    assert (tmp_path / "ranks" / "workerlog.1").read_text().count("parameters") == 0
