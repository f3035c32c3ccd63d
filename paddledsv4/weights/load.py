"""Load a Megatron state dict into the model, strictly. Our parameter names are Megatron's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np
import paddle
from paddle import Tensor, nn

from paddledsv4.errors import UserError


def named_tensors(model: nn.Layer) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, parameters first, in the model's order."""
    parameters = dict(model.named_parameters())
    persistent = set(model.state_dict())
    return parameters | {n: b for n, b in model.named_buffers() if n in persistent and n not in parameters}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def without_other_experts(state: Mapping[str, np.ndarray], here: range, experts: int) -> dict[str, np.ndarray]:
    """``state`` without those of the ``experts`` experts that other ranks hold."""
    elsewhere = set(range(experts)) - set(here)
    return {name: value for name, value in state.items() if expert_index(name) not in elsewhere}


def expert_index(name: str) -> int | None:
    """The expert, counted over all ranks, that a tensor belongs to; None for a dense one."""
    found = re.search(r"\.local_experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def load_megatron_state(model: nn.Layer, state: Mapping[str, np.ndarray]) -> None:
    """Copy ``state`` into the model in the model's dtypes. Nothing is copied unless everything fits.

    Raises:
        UserError: missing or extra names, or a shape that the config does not give.
    """
    tensors = named_tensors(model)
    missing = [name for name in tensors if name not in state]
    extra = [name for name in state if name not in tensors]
    if missing:
        raise UserError(f"weights: {_listed(missing)} missing, which the model config asks for")
    if extra:
        raise UserError(f"weights: {_listed(extra)} not in a model of this config")
    for name, tensor in tensors.items():
        if list(state[name].shape) != list(tensor.shape):
            raise UserError(
                f"weights: {name} has shape {list(state[name].shape)}, the model config gives {list(tensor.shape)}"
            )
    for name, tensor in tensors.items():
        tensor.set_value(paddle.to_tensor(np.ascontiguousarray(state[name])).astype(tensor.dtype))


def weights_md5(model: nn.Layer, only: Callable[[str], bool] = lambda name: True) -> str:
    """MD5 over the raw bytes of the parameters in sorted name order: of all, or of those that ``only`` chooses.

    Packed weights are no parameters and count all the same.
    """
    digest = hashlib.md5()
    packed = ((name, tensor) for name, tensor in model.named_buffers() if tensor.dtype in (paddle.int8, paddle.uint8))
    named = {name: tensor for name, tensor in [*model.named_parameters(), *packed] if only(name)}
    for _, parameter in sorted(named.items()):
        digest.update(np.ascontiguousarray(parameter.numpy()).tobytes())
    return digest.hexdigest()
