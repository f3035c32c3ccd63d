"""The repository is ruff-clean."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUFF = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed")
def test_ruff():
    root = Path(__file__).parents[2]
    checked = subprocess.run([RUFF, "check", "--quiet", "."], cwd=root, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
