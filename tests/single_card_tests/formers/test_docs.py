"""The script of docs/formers.md runs as it stands there, for one step."""

import re
import subprocess
import sys

import formers_runs  # noqa: F401  skips without PaddleFormers
from reference import ROOT

from paddledsv4.config import ModelConfig


def test_the_cookbook(tmp_path):
    page = (ROOT / "docs" / "formers.md").read_text(encoding="utf-8")
    script = re.search("```python\n(.*?)```", page, re.S)[1]
    script = script.replace("max_steps=10", "max_steps=1").replace("runs/formers", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Training completed" in done.stdout + done.stderr
    assert ModelConfig.from_file(tmp_path / "weights") == ModelConfig.from_file(ROOT / "configs" / "sft-tiny.yaml")
