"""Small checkpoints with the key set of a released one, written by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from reference import ROOT
from safetensors import TensorSpec, serialize_file

from paddledsv4.config import ModelConfig
from paddledsv4.config.files import read_model_section
from paddledsv4.weights.files import INDEX, read_folder
from paddledsv4.weights.source import listing
from paddledsv4.weights.storage import NUMPY

CONFIG = ROOT / "align" / "data" / "tiny-fp32"  # all three attention kinds, hash and learned routers, MTP
NAMES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I8": "int8",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
Listing = dict[str, tuple[str, tuple[int, ...]]]


def small_config(**changes) -> ModelConfig:
    return ModelConfig.from_file(CONFIG).replace(**changes)


def numbers(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Legal bytes of every dtype: finite numbers, scales around 1."""
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 127, shape, np.uint8)
        return codes | rng.integers(0, 2, shape, np.uint8) << 7
    if dtype == "F8_E8M0":
        return rng.integers(110, 130, shape, np.uint8)
    if dtype in ("I8", "I64", "I32"):
        return rng.integers(-128 if dtype == "I8" else 0, 8, shape, NUMPY[dtype])
    values = rng.standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(NUMPY[dtype])


def write_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    kept = {name: np.ascontiguousarray(array) for name, (_, array) in tensors.items()}
    specs = {
        name: TensorSpec(dtype=NAMES[dtype], shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for (name, a), (dtype, _) in zip(kept.items(), tensors.values(), strict=True)
    }
    serialize_file(specs, str(path), None)


def write_checkpoint(folder: Path, what: Listing, config: ModelConfig | None = None, files: int = 3) -> Path:
    """A folder with config.json, an index and so many files; every tensor of ``what``, random."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), list(what)
    index = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        mine = names[i * len(names) // files : (i + 1) * len(names) // files]
        write_file(folder / file, {n: (what[n][0], numbers(*what[n], rng)) for n in mine})
        index |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    values = read_model_section(CONFIG)[0] if config is None else config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def released(folder: Path, **changes) -> Path:
    config = small_config(**changes)
    return write_checkpoint(folder, listing(config), config)


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor."""
    stored = read_folder(folder)
    data = {file: file.read_bytes() for file in {s.file for s in stored.values()}}
    return {name: (s.dtype, s.shape, data[s.file][s.offset : s.offset + s.size]) for name, s in stored.items()}
