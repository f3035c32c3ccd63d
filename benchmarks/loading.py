"""Seconds to load a checkpoint into a model, beside plain sequential reading of the same files with safetensors.

Plain reading hands the bytes of each file to safetensors' ``deserialize``, which gives every tensor memory of its own;
its result is thrown away. (``safe_open`` and a copy of each torch tensor took longer.) Loading also checks names,
shapes and that all numbers are finite, and fills the parameters of a bfloat16 model. The two take turns, each in a
fresh process, since a process pays for new memory once; the fastest of each counts. Files are in the page cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddledsv4.host import prepare_host

prepare_host()

import typer  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors import TensorSpec, deserialize, serialize_file  # noqa: E402

from benchmarks.tell import run, tell  # noqa: E402
from paddledsv4.config import ModelConfig  # noqa: E402
from paddledsv4.model import DeepseekV4Model  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.transformer.build import unset_parameters  # noqa: E402
from paddledsv4.weights.convert import Conversion, convert  # noqa: E402
from paddledsv4.weights.source import Source  # noqa: E402

EXAMPLES = """Examples:

    python benchmarks/loading.py

    python benchmarks/loading.py --scratch /fast/disk --json loading.json
"""
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "align" / "data" / "tiny-fp32"
LARGE = {"hidden_size": 1024, "vocab_size": 32768, "moe_intermediate_size": 1024, "n_routed_experts": 32}


def plain(folder: Path) -> None:
    """Every tensor of every file, in order."""
    for file in sorted(folder.glob("*.safetensors")):
        deserialize(file.read_bytes())


def unset_model(folder: Path) -> DeepseekV4Model:
    """A model whose memory is taken when it is filled."""
    with unset_parameters():
        return DeepseekV4Model(ModelConfig.from_file(folder), Policy.preset("paddle"), "bf16")


def seconds(what: str, folder: Path) -> float:
    """Wall time of ``plain`` or ``load`` in a process of its own; the model is built before."""
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.loading import plain, unset_model\n"
        "from paddledsv4.weights.from_checkpoint import load_checkpoint\n"
        "folder = Path(sys.argv[2]); given = [unset_model(folder)] if sys.argv[1] == 'load' else []\n"
        "start = time.perf_counter(); (load_checkpoint if given else plain)(*given, folder)\n"
        "print(time.perf_counter() - start)"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code, what, folder], cwd=ROOT, text=True,
                           capture_output=True, check=True)  # fmt: skip
    return float(ended.stdout.splitlines()[-1])


def checkpoints(scratch: Path) -> dict[str, Path]:
    """A model of 0.6 billion parameters, drawn, in bfloat16 and as released (FP8, FP4)."""
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
            turns = [(seconds("plain", path), seconds("load", path)) for _ in range(repeat)]
            theirs, ours = (min(turn[i] for turn in turns) for i in (0, 1))
            figures.append({"checkpoint": name, "bytes": size, "plain_seconds": theirs, "seconds": ours})
            speeds = (size / theirs / 1e9, size / ours / 1e9, theirs / ours)
            table.add_row(name, f"{size / 1e9:.2f}", *(f"{speed:.2f}" for speed in speeds))
    tell(table, figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
