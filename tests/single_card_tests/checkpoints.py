"""What tests of checkpoints share: a small run that can be stopped and resumed, and its state as bytes."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import paddle
from layouts import trainer

from paddledsv4.config import CheckpointConfig
from paddledsv4.training.checkpoint.record import read_rank, read_record
from paddledsv4.training.checkpoint.run import checkpointing
from paddledsv4.training.checkpoint.shard import ShardFile
from paddledsv4.training.checkpoint.state import host_array, state

CHANGES = {"gradient_accumulation_steps": 1, "steps": 10}


def small(preset: str = "paddle", precision: str = "fp32", **changes):
    """A trainer of the smallest model with every mechanism."""
    return trainer(preset, precision, **CHANGES | changes)


def config(folder: Path, **values) -> CheckpointConfig:
    return CheckpointConfig.from_dict({"dir": str(folder), "save_interval": 5} | values)


def train(runner, folder: Path | None = None, source: str | None = None, stop: int = 99, force=False, **values):
    """Train to the end, or until step ``stop`` is done and saved. Returns the results and the notes."""
    saving = config(folder, **values) if folder else CheckpointConfig()
    results = []
    with checkpointing(runner, saving, source, force) as (steps, notes):
        for result in steps:
            if result.step > stop:
                break
            results.append(result)
    return results, notes


def numbers(results) -> list:
    """All that a step computes and logs."""
    return [(r.step, [(x.main, x.mtp) for x in r.losses], r.grad_norm, r.learning_rate) for r in results]


def state_bytes(runner) -> dict[str, bytes]:
    """Parameters, buffers, masters and moments by name."""
    return {piece.name: host_array(tensor).tobytes() for piece, tensor in state(runner)}


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of one rank, each checked."""
    shard = ShardFile(folder, read_rank(folder, 0, read_record(folder)))
    return {name: shard.read(piece) for name, piece in shard.pieces.items()}


@contextlib.contextmanager
def noise(runner):
    """Every forward pass draws from Paddle's, numpy's and Python's generators."""

    def add(layer, inputs, output):
        drawn = paddle.randn(output.shape, "float32").astype(output.dtype)
        return output + drawn * 0.01 + float(np.random.normal() + random.gauss(0, 1)) * 0.01

    hook = runner.model.embedding.register_forward_post_hook(add)
    try:
        yield
    finally:
        hook.remove()
