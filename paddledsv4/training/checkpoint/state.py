"""What of a trainer a checkpoint keeps, and which rank writes what.

Tensors: ``model/NAME`` parameters and persistent buffers (expert bias, hash tables), ``m/NAME`` and ``v/NAME`` the
moments, ``master/NAME`` where the optimizer updates a wider copy. Main gradients and token counts are zero between
steps. With LoRA, the model is the adapters alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.distributed.group import Groups
from paddledsv4.ops.precision import dtype_name
from paddledsv4.training.checkpoint.shard import Piece, in_file_order
from paddledsv4.weights.load import expert_index, named_tensors
from paddledsv4.weights.shards import shares_of, split_of

if TYPE_CHECKING:
    from paddledsv4.training.trainer import Trainer

SAFETENSORS = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def state(trainer: Trainer) -> Iterator[tuple[Piece, Tensor]]:
    """Everything that this rank holds but what is frozen beneath adapters."""
    groups = trainer.groups
    for name, tensor in named_tensors(trainer.model).items():
        if name not in trainer.frozen:
            yield _piece("model", name, tensor, groups), tensor
    for kept in trainer.optimizer.states:
        own = {"m": kept.m, "v": kept.v}
        if kept.master.dtype != kept.parameter.dtype:
            own["master"] = kept.master
        for kind, tensor in own.items():
            yield _piece(kind, kept.name, tensor, groups), tensor


def _piece(kind: str, name: str, tensor: Tensor, groups: Groups) -> Piece:
    """Where this rank's tensor lies in the whole one, of which tensor ranks hold equal shares.

    A parameter that is shared out in blocks (gate and linear half of a SwiGLU) is kept as [blocks, ...], whoever holds
    it, so that a share is one piece.
    """
    split, group = split_of(name), shares_of(name, groups)
    dtype, shape = SAFETENSORS[dtype_name(tensor)], list(tensor.shape)
    if split is None:
        return Piece.whole(f"{kind}/{name}", dtype, shape)
    axis = split.dim
    if split.blocks > 1:
        shape[axis : axis + 1] = [split.blocks, shape[axis] // split.blocks]
        axis += 1
    whole, offset = list(shape), [0] * len(shape)
    whole[axis], offset[axis] = shape[axis] * group.size, shape[axis] * group.rank
    return Piece(f"{kind}/{name}", dtype, tuple(shape), tuple(whole), tuple(offset))


def owned(piece: Piece, groups: Groups) -> bool:
    """Whether this rank is the one that writes the piece: of all ranks that hold it, the first."""
    if expert_index(piece.name) is not None and groups.expert_shards.size > 1:
        return groups.expert_data.rank == 0
    return groups.replicas.rank == 0 and (piece.shape != piece.global_shape or groups.tensor.rank == 0)


class Snapshot:
    """The tensors that this rank writes, as arrays."""

    def __init__(self, trainer: Trainer):
        tensors = {piece: tensor for piece, tensor in state(trainer) if owned(piece, trainer.groups)}
        self.pieces = in_file_order(tensors)
        self._tensors = [tensors[piece] for piece in self.pieces]
        self._copies: list[np.ndarray] = []

    def take(self, copy: bool) -> list[np.ndarray]:
        """In the order of ``pieces``: the numbers themselves where a CPU holds them, or, with ``copy``, as they are
        now, in memory that is allocated once and used again."""
        arrays = [host_array(tensor) for tensor in self._tensors]
        if not copy:
            return arrays
        self._copies = self._copies or [np.empty_like(array) for array in arrays]
        for mine, now in zip(self._copies, arrays, strict=True):
            np.copyto(mine, now)
        return self._copies


def host_array(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers: its own memory on a CPU, else a copy. bfloat16 as the uint16 of its bits."""
    tensor = tensor.detach()
    if not tensor.place.is_cpu_place():
        return tensor.numpy()
    if tensor.dtype == paddle.bfloat16:
        return np.from_dlpack(tensor.view("int16")).view(np.uint16)
    return np.from_dlpack(tensor)


def random_state() -> dict[str, Any]:
    """Of Python's and numpy's generators. Paddle's is set anew for every step, see ``Trainer.train``."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest]}


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Undo :func:`random_state`."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
