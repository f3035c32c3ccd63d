"""What the ranks run to load a checkpoint: ``loading_jobs.py JOB FOLDER EXPERT FILE``.

Every rank leaves FILE.RANK: the MD5 of every tensor, and how its memory grew.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from paddledsv4.host import prepare_host

prepare_host(bitwise=True)

import numpy as np  # noqa: E402
from paddle import Tensor  # noqa: E402

from paddledsv4.config import ModelConfig, ParallelConfig  # noqa: E402
from paddledsv4.distributed.connect import connect  # noqa: E402
from paddledsv4.distributed.group import ALONE, Groups  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.model import DeepseekV4Model  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.transformer.build import unset_parameters  # noqa: E402
from paddledsv4.weights import from_checkpoint  # noqa: E402
from paddledsv4.weights.from_checkpoint import load_checkpoint  # noqa: E402
from paddledsv4.weights.load import named_tensors  # noqa: E402

RANKS = int(os.environ.get("PADDLE_TRAINERS_NUM", 1))


def memory(field: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def md5(tensor: Tensor) -> str:
    array = tensor.view("int16") if tensor.dtype.name == "BFLOAT16" else tensor
    return hashlib.md5(np.ascontiguousarray(array.numpy()).tobytes()).hexdigest()


def load(groups: Groups, folder: str) -> dict:
    """Build and load, with the memory that it took beyond what the process had before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, start = memory("VmRSS"), time.monotonic()
    with unset_parameters():
        model = DeepseekV4Model(ModelConfig.from_file(folder), Policy.preset("paddle"), "bf16", groups)
    load_checkpoint(model, Path(folder), groups)
    grown, seconds = memory("VmHWM") - before, time.monotonic() - start
    tensors = named_tensors(model)
    sizes = [tensor.size * tensor.element_size() for tensor in tensors.values()]
    return {
        "grown": grown, "seconds": seconds, "shard": sum(sizes), "largest": max(sizes),
        "md5": {name: md5(tensor) for name, tensor in tensors.items()},
    }  # fmt: skip


def without_files(groups: Groups, folder: str) -> dict:
    """Only rank 0 may look at the checkpoint."""
    if groups.world.rank:
        from_checkpoint.Source = None
    return load(groups, folder)


JOBS = {"load": load, "without_files": without_files}


def main() -> None:
    job, folder, expert, file = sys.argv[1:]
    start = time.monotonic()
    try:
        with connect(ParallelConfig(world_size=RANKS, data=RANKS, expert=int(expert))) as groups:
            groups.world.barrier()
            start = time.monotonic()
            outcome = JOBS[job](groups, folder)
            Path(f"{file}.{groups.world.rank}").write_text(json.dumps(outcome))
    except UserError as error:
        print(time.monotonic() - start)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def alone(folder: str) -> dict:
    return load(ALONE, folder)


if __name__ == "__main__":
    main()
