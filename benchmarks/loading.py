"""Seconds to load a checkpoint into a model, beside plain sequential reading of the same files with safetensors.

Plain reading takes every tensor of every file in order into memory of its own (safetensors for torch, as numpy has no
bfloat16), and throws it away. Loading also checks names, shapes and that all numbers are finite, and fills the
parameters of a bfloat16 model. The two take turns, and the fastest of each counts; the files are in the page cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddledsv4.host import prepare_host

prepare_host()

import typer  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors import safe_open  # noqa: E402

from benchmarks.tell import run, tell  # noqa: E402
from paddledsv4.config import ModelConfig  # noqa: E402
from paddledsv4.model import DeepseekV4Model  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.transformer.build import unset_parameters  # noqa: E402
from paddledsv4.weights.convert import Conversion, convert  # noqa: E402
from paddledsv4.weights.from_checkpoint import load_checkpoint  # noqa: E402
from paddledsv4.weights.source import Source  # noqa: E402

EXAMPLES = """Examples:

    python benchmarks/loading.py

    python benchmarks/loading.py --scratch /fast/disk --json loading.json
"""
TINY = Path(__file__).resolve().parents[1] / "align" / "data" / "tiny-fp32"
LARGE = {"hidden_size": 1024, "vocab_size": 32768, "moe_intermediate_size": 1024, "n_routed_experts": 32}


def plain(folder: Path) -> None:
    """Every tensor of every file, in order."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name).clone()


def load(folder: Path) -> Callable[[], None]:
    """Into a model that is built beforehand; its memory is taken, and therefore paid for, when it is filled."""
    config = ModelConfig.from_file(folder)
    with unset_parameters():
        model = DeepseekV4Model(config, Policy.preset("paddle"), "bf16")
    return lambda: load_checkpoint(model, folder)


def seconds(call: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def checkpoints(scratch: Path) -> dict[str, Path]:
    """A model of 0.6 billion parameters, drawn, in bfloat16 and as released (FP8, FP4)."""
    from safetensors import TensorSpec, serialize_file

    config = ModelConfig.from_file(TINY).replace(**LARGE)
    model = DeepseekV4Model(config, Policy.preset("paddle"), "bf16")
    arrays, specs = [], {}
    for name, tensor in model.state_dict().items():
        bits = tensor.view("int16") if tensor.dtype.name == "BFLOAT16" else tensor
        arrays.append(bits.numpy())
        dtype = {"BFLOAT16": "bfloat16", "FP32": "float32"}.get(tensor.dtype.name, str(arrays[-1].dtype))
        shape, array = list(tensor.shape), arrays[-1]
        specs[name] = TensorSpec(dtype=dtype, shape=shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
    serialize_file(specs, str(scratch / "drawn.safetensors"), None)
    values = {k: v for k, v in config.model_dump(mode="json").items() if v is not None}
    folders = {}
    for name, dtype in (("bf16, our names", "keep"), ("FP4 and FP8, released names", "released")):
        folders[name] = scratch / dtype
        with Source.open(scratch / "drawn.safetensors", config) as source:
            convert(Conversion(source, "released" if dtype == "released" else "paddledsv4", dtype), folders[name],
                    values, limit=10**9)  # fmt: skip
    (scratch / "drawn.safetensors").unlink()
    return folders


def main(
    repeat: Annotated[int, typer.Option(min=1, help="Turns; the fastest counts.")] = 5,
    scratch: Annotated[Path | None, typer.Option(help="Where to write 2 GB for the time of the run.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    table = Table("checkpoint", "GB", "plain reading GB/s", "loading GB/s", "loading / plain reading")
    figures = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, path in checkpoints(Path(folder)).items():
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            turns = [(seconds(lambda path=path: plain(path)), seconds(load(path))) for _ in range(repeat)]
            theirs, ours = (min(turn[i] for turn in turns) for i in (0, 1))
            figures.append({"checkpoint": name, "bytes": size, "plain_seconds": theirs, "seconds": ours})
            speeds = (size / theirs / 1e9, size / ours / 1e9, theirs / ours)
            table.add_row(name, f"{size / 1e9:.2f}", *(f"{speed:.2f}" for speed in speeds))
    tell(table, figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
