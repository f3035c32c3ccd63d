"""A state dict in memory from one format to another. Float weights only: packed ones go through ``convert``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError
from paddledsv4.weights.names import Atom, tensors


def rename(
    state: Mapping[str, np.ndarray], config: ModelConfig, source: str, target: str = "paddledsv4"
) -> dict[str, np.ndarray]:
    """The tensors of ``state``, named, split and joined as ``target`` has them.

    Raises:
        UserError: a tensor that the model has no place for, or one that is missing or misshapen.
    """
    known = tensors(config, source)
    for name in [*state, *known]:
        if name not in known or name not in state:
            problem = "is missing" if name in known else "has no place in a model of this config"
            raise UserError(f"weights: {source} tensor {name} {problem}")
    for name, tensor in known.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"weights: {name} has shape {list(state[name].shape)}, the model config gives {list(tensor.shape)}"
            )

    def piece(atom: Atom) -> np.ndarray:
        slot = atom.slot(source)
        if slot is None:
            raise UserError(f"weights: {source} has no MTP layers; num_nextn_predict_layers must be 0")
        rows = state[slot.name].reshape(slot.parts, *atom.shape)
        return rows[slot.part]

    return {
        name: np.concatenate([piece(atom) for atom in tensor.atoms]).reshape(tensor.shape)
        for name, tensor in tensors(config, target).items()
    }
