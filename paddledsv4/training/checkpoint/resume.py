"""From a checkpoint back into a trainer, of the same layout or another one."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.distributed.connect import check_same
from paddledsv4.errors import UserError
from paddledsv4.moe.experts import local_experts
from paddledsv4.training.checkpoint.directory import Directory, find
from paddledsv4.training.checkpoint.identity import KINDS, differences, identity, layout, other_arithmetic
from paddledsv4.training.checkpoint.record import digest, read_rank, read_record
from paddledsv4.training.checkpoint.shard import DTYPES, Piece, ShardFile
from paddledsv4.training.checkpoint.state import set_random_state, state
from paddledsv4.weights.load import expert_index

if TYPE_CHECKING:
    from paddledsv4.training.trainer import Trainer

Found = list[tuple[ShardFile, Piece]]


def resume(trainer: Trainer, source: Path, force: bool = False) -> list[str]:
    """Give the trainer the state of a checkpoint. Returns what a person should know about it, one sentence each.

    Args:
        source: an iter_N, or the folder of a run, of which the latest is taken.
        force: also if the checkpoint is of another configuration or numeric policy, as far as its tensors fit.

    Raises:
        UserError: there is none, it is damaged, or belongs to another run. On every rank, if on one.
    """
    directory, step = find(source)
    folder = directory.folder(step)
    with _offering(directory, step):
        record = read_record(folder)
        ranks = [read_rank(folder, rank, record) for rank in range(record["ranks"])]
    other = list(differences(record["run"], identity(trainer)))
    if other and not force:
        raise UserError(f"{folder} was saved by another run: {_listed(other)}; --force resumes all the same")
    with _offering(directory, step):
        _restore(trainer, _Tensors(folder, ranks))
    trainer.go_on_after(record["step"], record["rows_seen"])
    world = trainer.groups.world
    set_random_state(ranks[min(world.rank, len(ranks) - 1)]["random"])
    if world.size > 1:
        check_same(world, {"the checkpoint": digest(str(record["files"]).encode())})
        trainer.check_ranks()
    return [f"resumed after step {step} from {folder}", *_notes(trainer, record, other)]


@contextlib.contextmanager
def _offering(directory: Directory, step: int) -> Iterator[None]:
    """An error says which older checkpoint there is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}{directory.offer(step)}") from None


def _notes(trainer: Trainer, record: dict[str, Any], other: list[str]) -> Iterator[str]:
    if other:
        yield f"forced, although it differs: {_listed(other)}"
    saved, here = record["layout"], layout(trainer.parallel, trainer.train_config)
    if saved == here:
        return
    reason = other_arithmetic(saved, here, trainer.train_config)
    kinds = [kind for kind in (*KINDS, "accumulation") if saved[kind] != here[kind]]
    change = ", ".join(f"{kind} {saved[kind]} -> {here[kind]}" for kind in kinds)
    yield f"another layout ({change}): " + (f"not bit for bit: {reason}" if reason else "goes on bit for bit")


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


class _Tensors:
    """Where every tensor of a checkpoint is; files are opened when the first of their tensors is asked for."""

    def __init__(self, folder: Path, ranks: list[dict[str, Any]]):
        self.folder = folder
        self._records = {record["file"]: record for record in ranks}
        self._opened: dict[str, ShardFile] = {}
        self._files: dict[str, list[str]] = defaultdict(list)
        for record in ranks:
            for entry in record["tensors"]:
                self._files[entry["name"]].append(record["file"])

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def find(self, wanted: Piece) -> Found:
        """The saved pieces that together hold ``wanted``.

        Raises:
            UserError: they do not, or they are of another kind.
        """
        shards = [self._open(file) for file in self._files[wanted.name]]
        held = [(shard, shard.pieces[wanted.name]) for shard in shards]
        found = [(shard, piece) for shard, piece in held if _overlap(piece, wanted)]
        for shard, piece in found:
            for what in "dtype", "global_shape":
                if (saved := getattr(piece, what)) != (here := getattr(wanted, what)):
                    raise UserError(f"{shard.path}: tensor {wanted.name} has {what} {saved}, this run's has {here}")
        size = sum(math.prod(n for _, n in _overlap(piece, wanted)) for _, piece in found)
        if size != math.prod(wanted.shape):
            raise UserError(f"{self.folder}: tensor {wanted.name} is not whole: {size} elements of {wanted.shape}")
        return found

    def _open(self, file: str) -> ShardFile:
        if file not in self._opened:
            self._opened[file] = ShardFile(self.folder, self._records[file])
        return self._opened[file]


def _overlap(a: Piece, b: Piece) -> list[tuple[int, int]] | None:
    """First index and number of the elements that both hold, by dimension; None if there are none."""
    if len(a.shape) != len(b.shape):
        return [(0, 0)]  # the message about shapes comes first
    ends = (min(p + n, q + m) for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    common = [(max(p, q), end - max(p, q)) for p, q, end in zip(a.offset, b.offset, ends, strict=True)]
    return None if any(n <= 0 for _, n in common) else common


def _restore(trainer: Trainer, saved: _Tensors) -> None:
    """All names, shapes and dtypes are checked before the first number is copied."""
    wanted = dict(state(trainer))
    experts = trainer.model.config.n_routed_experts
    elsewhere = set(range(experts)) - set(local_experts(experts, trainer.groups.expert))
    names = {piece.name for piece in wanted}
    if missing := sorted(names - saved.names):
        raise UserError(f"{saved.folder}: lacks {_listed(missing)}, which this run needs")
    if extra := sorted(name for name in saved.names - names if expert_index(name) not in elsewhere):
        raise UserError(f"{saved.folder}: holds {_listed(extra)}, which this run does not have")
    found = {piece: saved.find(piece) for piece in wanted}
    for piece, tensor in wanted.items():
        _copy(piece, tensor, found[piece])


@paddle.no_grad()
def _copy(wanted: Piece, tensor: Tensor, found: Found) -> None:
    shard, piece = found[0]
    if piece == wanted:
        tensor.set_value(shard.read(piece).reshape(tensor.shape))
        return
    whole = np.empty(wanted.shape, DTYPES[wanted.dtype])
    for shard, piece in found:
        common = _overlap(piece, wanted)
        whole[_within(wanted, common)] = shard.read(piece)[_within(piece, common)]
    tensor.set_value(whole.reshape(tensor.shape))


def _within(piece: Piece, common: list[tuple[int, int]]) -> tuple[slice, ...]:
    starts = [first - offset for (first, _), offset in zip(common, piece.offset, strict=True)]
    return tuple(slice(start, start + n) for start, (_, n) in zip(starts, common, strict=True))
