"""The weights of a model as a checkpoint folder: safetensors under our names, an index and config.json."""

from __future__ import annotations

import json
from pathlib import Path

from paddledsv4.config import ModelConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.weights.from_checkpoint import DTYPES
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.shards import gather_full
from paddledsv4.weights.writer import Entry, Folder, shards

LARGEST = 5_000_000_000  # bytes of one file


def save_model(model: DeepseekV4Model, target: Path, groups: Groups = ALONE, also: tuple[Path, ...] = ()) -> int:
    """Write parameters and persistent buffers in the model's dtypes; rank 0 writes, all ranks call it.

    The folder can be trained from (``weights:`` in a recipe) and converted (``paddledsv4 convert``).

    Args:
        target: the folder, which appears when all of it is there.
        also: small text files to copy into it.

    Returns:
        Bytes of all tensors.

    Raises:
        UserError: ``target`` exists or cannot be written, or no rank has all experts.
    """
    if groups.expert.size > 1:
        raise UserError("weights are written where a rank has all experts; parallel.expert must be 1")
    tensors = named_tensors(model)
    arrays = gather_full(tensors, groups)
    entries = [
        Entry(name, DTYPES[tensor.dtype][0], arrays[name].shape, lambda name=name: [arrays[name]])
        for name, tensor in tensors.items()
    ]
    if groups.world.rank == 0:
        write_model(target, entries, model.config, also)
    return sum(entry.size for entry in entries)


def write_model(target: Path, entries: list[Entry], model: ModelConfig, also: tuple[Path, ...] = ()) -> None:
    """Write tensors, their index, config.json and copies of the small text files ``also`` into a new folder.

    Raises:
        UserError: ``target`` exists or cannot be written. Nothing is left then.
    """
    config = {"model_type": "deepseek_v4"} | model.model_dump(mode="json")
    files, folder = shards(entries, LARGEST), Folder(target, {"config": config})
    try:
        folder.check_space(sum(entry.size for entry in entries))
        for name, group in files.items():
            folder.write(name, group, lambda size: None)
        folder.write_index(files)
        folder.finish_text("config.json", json.dumps(config, indent=2) + "\n")
        for path in also:
            folder.finish_text(path.name, path.read_text(encoding="utf-8"))
        folder.publish()
    except Exception:
        folder.discard()
        raise
