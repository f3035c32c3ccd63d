"""Weights of a model from a checkpoint of any format, on many ranks, each byte read and kept once.

Of the ranks that share a parameter the first one reads it, straight into the parameter's memory, and broadcasts it to
the others, which open no file. Experts are shared by the ranks of ``expert_data``, everything else by ``replicas``: so
under expert parallelism every rank reads its own experts. Names, shapes and dtypes are checked before any data moves,
and what goes wrong on one rank is an error on all.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.distributed.connect import fail_together
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.weights import mxfp4, storage
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.names import Atom, expert_index, tensors
from paddledsv4.weights.shards import shares_of, split_of
from paddledsv4.weights.source import Source

THREADS = min(4, os.cpu_count() or 1)  # that read and unpack; numpy lets them run side by side
# Paddle's dtype -> safetensors' name of it, and the integer dtype of as many bits, which numpy can be lent
DTYPES = {
    paddle.float64: ("F64", "int64"), paddle.float32: ("F32", "int32"), paddle.bfloat16: ("BF16", "int16"),
    paddle.int64: ("I64", "int64"), paddle.int32: ("I32", "int32"),
    paddle.int8: ("I8", "int8"), paddle.uint8: ("F8_E8M0", "uint8"),
}  # fmt: skip


def load_checkpoint(model: DeepseekV4Model, path: Path, groups: Groups = ALONE) -> None:
    """Fill all parameters and persistent buffers of ``model`` from a folder or file; computed buffers stay.

    Raises:
        UserError: on every rank, within seconds, if a tensor is missing, extra, misshapen, unreadable or has numbers
            that are NaN or infinite. The model is of no use then.
    """
    everything = named_tensors(model)
    experts = {name: tensor for name, tensor in everything.items() if expert_index(name) is not None}
    dense = {name: tensor for name, tensor in everything.items() if name not in experts}
    reads = groups.replicas.rank == 0 or (experts and groups.expert_data.rank == 0)
    source, problem = None, None
    if reads:
        try:
            source = Source.open(path, model.config)
        except UserError as error:
            problem = str(error)
    fail_together(groups.world, problem)
    try:
        reader = _Reader(source, model, groups) if source else None
        for part, group in ((experts, groups.expert_data), (dense, groups.replicas)):
            fail_together(groups.world, _load(part.items(), reader, group))
    finally:
        if source:
            source.close()


def _load(part: Iterable[tuple[str, Tensor]], reader: _Reader | None, group: Group) -> str | None:
    """Fill these tensors on all members of the group; returns what went wrong, of which every member hears."""
    with ThreadPoolExecutor(THREADS, "weights") as threads:
        tensors = _ahead(part, reader, threads) if group.rank == 0 else ((*item, None) for item in part)
        for name, tensor, filled in tensors:
            problem = None
            try:
                if filled:
                    filled()
            except UserError as error:
                problem = str(error)
            if _any(problem is not None, group):
                return problem or f"tensor {name} could not be read"
            group.broadcast_(tensor.detach())  # shares its memory
    return None


def _ahead(
    part: Iterable[tuple[str, Tensor]], reader: _Reader, threads: Executor
) -> Iterator[tuple[str, Tensor, Callable[[], None]]]:
    """Every tensor with what ends its filling, the next ones being read meanwhile."""
    begun: deque[tuple[str, Tensor, Callable[[], None]]] = deque()
    for name, tensor in part:
        begun.append((name, tensor, reader.fill(name, tensor, threads)))
        if len(begun) > THREADS:
            yield begun.popleft()
    yield from begun


def _any(failed: bool, group: Group) -> bool:
    """Whether the reading member failed, on every member."""
    if group.size == 1:
        return failed
    return group.broadcast_(paddle.full([1], failed, "int32")).tolist() != [0]


class _Reader:
    """Reads our tensors from a source of any format."""

    def __init__(self, source: Source, model: DeepseekV4Model, groups: Groups):
        self.source, self.table, self.groups = source, tensors(model.config, "paddledsv4"), groups

    def fill(self, name: str, tensor: Tensor, threads: Executor) -> Callable[[], None]:
        """Begin to read a tensor into its memory; of one that tensor ranks share out, its share. The result waits for
        the end and raises what went wrong."""
        if tensor.dtype in (paddle.int8, paddle.uint8):
            return functools.partial(self._fill_packed, name, tensor)
        dtype, shares = DTYPES[tensor.dtype][0], shares_of(name, self.groups)
        split = split_of(name) if shares.size > 1 else None
        shape, memory = self.table[name].shape, None if split else _memory(tensor)
        lent = memory if memory is not None else np.empty(math.prod(shape), storage.NUMPY[dtype])
        reading = threads.submit(self._read, self.table[name].atoms, lent.view(storage.NUMPY[dtype]), dtype)

        def end() -> None:
            reading.result()
            if memory is not None:
                return
            array = lent.reshape(shape)
            if split:
                array = np.ascontiguousarray(split.shard(array, shares.rank, shares.size))
            tensor.set_value(paddle.to_tensor(array.view("<i2")).view("bfloat16") if dtype == "BF16" else array)

        return end

    def _read(self, atoms: Sequence[Atom], out: np.ndarray, dtype: str) -> None:
        for atom, piece in zip(atoms, out.reshape(len(atoms), -1), strict=True):
            kept = self.source.storage(atom)
            if kept.weight == dtype:
                self.source.read_into(self.source.weight(atom, kept), piece)
            else:
                piece[:] = self.source.values(atom, narrow=dtype == "BF16").reshape(-1)


    def _fill_packed(self, name: str, tensor: Tensor) -> None:
        """MXFP4 numbers or their scales: as they are stored, else made from what is stored, one atom at a time."""
        atoms = self.table[name.removesuffix("_scale")].atoms
        lent = np.empty(tensor.shape, storage.NUMPY[DTYPES[tensor.dtype][0]])
        for atom, piece in zip(atoms, lent.reshape(len(atoms), -1), strict=True):
            kept, scale = self.source.storage(atom), name.endswith("_scale")
            if kept.weight == "I8":
                self.source.read_into((self.source.scale if scale else self.source.weight)(atom, kept), piece)
            else:
                piece[:] = mxfp4.quantize(self.source.values(atom))[scale].reshape(-1)
        tensor.set_value(lent)


def _memory(tensor: Tensor) -> np.ndarray | None:
    """The memory of a tensor on a CPU, as flat integers of the size of its elements; None if it is elsewhere, or numpy
    is older than 2, which lends memory for reading only."""
    if not tensor.place.is_cpu_place() or not tensor.is_contiguous():
        return None
    memory = np.from_dlpack(tensor.detach().view(DTYPES[tensor.dtype][1])).reshape(-1)
    return memory if memory.flags.writeable else None
