"""Every fused kernel on one GPU, with torch tensors as carriers: time, rate, share of the ceiling, rivals, errors.

In one call the two ceilings of the device (a large copy, a large bf16 GEMM) are measured beside the kernels, the same
computation in plain torch operations, and other libraries that can be imported. Paddle is not needed. A family of
kernels has a process of its own, and so has a rival known to hang; another that does ends its family, which by then has
printed and saved all before it, and the kernel that it was compared with.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import typer

from benchmarks.kernel_timing import clean, copy_rate, gemm_rate
from benchmarks.kernels_family import Result, save

EXAMPLES = """Examples:

    python benchmarks/kernels.py

    python benchmarks/kernels.py --family gemm,mhc --quick --json kernels.json

    python benchmarks/kernels.py --family attn --only "sparse attention" --without tilelang
"""
ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("mhc", "attn", "gemm", "layer")


def main(
    family: Annotated[str, typer.Option(help="Which kernels, separated by commas.")] = ",".join(FAMILIES),
    quick: Annotated[bool, typer.Option(help="The shorter sequence only.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name has this text.")] = "",
    json_: Annotated[Path | None, typer.Option("--json", help="Write every figure there.")] = None,
    limit: Annotated[int, typer.Option(help="Seconds for one case, after which its family ends.", min=1)] = 120,
    without: Annotated[str, typer.Option(help="Rivals to leave out, separated by commas.")] = "",
) -> None:
    """Fused kernels at the shapes of DeepSeek-V4-Flash on one GPU, beside plain torch and other libraries."""
    started, device = time.time(), torch.cuda.get_device_name()
    ceilings = {"bytes": copy_rate(), "flops": gemm_rate()}
    clean()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}; copy "
          f"{ceilings['bytes'] / 1e9:.0f} GB/s, bf16 GEMM {ceilings['flops'] / 1e12:.0f} TFLOP/s", flush=True)
    record = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "ceilings": ceilings,
              "started": started, "cases": [], "reports": {}, "ended": []}  # fmt: skip
    options = json.dumps({"quick": quick, "only": only, "limit": limit, "without": without.split(",")})
    with tempfile.TemporaryDirectory() as folder:
        path = json_ or Path(folder, "kernels.json")
        save(record, path)
        for name in family.split(","):
            command = [sys.executable, "-m", "benchmarks.kernels_family", name, str(path.resolve()), options]
            code = subprocess.run(command, cwd=ROOT).returncode
            record = json.loads(path.read_text())
            if name not in record["ended"]:
                print(f"{name}: ended with {code} before its last case", flush=True)
    right = all(Result(**case).right for case in record["cases"])
    raise typer.Exit(0 if right and record["ended"] == family.split(",") else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=EXAMPLES)(main)
    app()
