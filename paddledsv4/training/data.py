"""Where microbatches come from: tokens on disk, and which of them every microbatch of every rank sees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from paddledsv4.config import ParallelConfig, TrainConfig
from paddledsv4.errors import UserError

UINT16_TOKENS = 1 << 16


class Microbatch(NamedTuple):
    """What a rank trains on at once.

    Attributes:
        inputs, labels: [b, s] int64.
        loss_mask: [b, s] floats, 1 where a label counts; None: everywhere.
        cu_seqlens: for each row where its documents begin, and its length; None: every row is one document.
    """

    inputs: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray | None = None
    cu_seqlens: list[np.ndarray] | None = None


class Source(Protocol):
    """An endless list of rows, of which every microbatch takes the next ones."""

    fingerprint: str  # tells the data from any other

    def rows(self, first: int, count: int) -> Microbatch:
        """Rows ``first`` to ``first + count``."""
        ...


class TokenTable:
    """Rows of a table [rows, sequence_length + 1], from the start again past the last. Context rank ``context_rank``
    takes slice ``context_rank`` of each, of so many as ``parallel`` says."""

    def __init__(self, tokens: np.ndarray, train: TrainConfig, parallel: ParallelConfig, context_rank: int = 0):
        self.tokens, self.fingerprint = tokens, table_fingerprint(tokens)
        length = train.sequence_length // parallel.context
        self.columns = slice(context_rank * length, (context_rank + 1) * length + 1)

    def rows(self, first: int, count: int) -> Microbatch:
        """Inputs and labels [count, sequence_length / context]."""
        rows = np.arange(first, first + count) % len(self.tokens)
        table = np.asarray(self.tokens[rows, self.columns], dtype=np.int64)
        return Microbatch(table[:, :-1].copy(), table[:, 1:].copy())


def load_tokens(path: str | Path, sequence_length: int, vocab_size: int) -> np.ndarray:
    """Token ids [rows, sequence_length + 1], a memory map; a row holds inputs [:-1] and labels [1:].

    Three formats: an .npy of exactly that shape; an .npy with one dimension; a headerless little-endian .bin,
    uint16 for vocabularies up to 65,536 ids and uint32 beyond. A flat stream of n tokens is cut into
    ``(n - 1) // sequence_length`` rows that share one token, so each token but the first is predicted once.

    Raises:
        UserError: no such file, another format or shape, too few tokens, or an id outside the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"tokens = {str(path)!r}: there is no such file")
    readers = {".npy": _read_npy, ".bin": _read_bin}
    if path.suffix not in readers:
        raise UserError(f"tokens = {str(path)!r}: must be an .npy or a .bin file")
    tokens = readers[path.suffix](path, vocab_size)
    rows = _cut(tokens, sequence_length, path) if tokens.ndim == 1 else tokens
    if rows.ndim != 2 or rows.shape[1] != sequence_length + 1:
        raise UserError(
            f"tokens = {str(path)!r}: has shape {list(tokens.shape)}, must be [rows, sequence_length + 1 = "
            f"{sequence_length + 1}] or one flat dimension"
        )
    if not len(rows):
        raise UserError(f"tokens = {str(path)!r}: has no rows")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"tokens = {str(path)!r}: holds ids from {low} to {high}, "
            f"must lie in [0, vocab_size = {vocab_size})"
        )
    return rows


def batches(
    tokens: np.ndarray,
    step: int,
    microbatch: int,
    data_rank: int,
    train: TrainConfig,
    parallel: ParallelConfig,
    context_rank: int = 0,
    skipped: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [micro_batch_size, sequence_length / context] int64 of one microbatch on one rank.

    ``step`` and ``microbatch`` count from 0; all rows are ``skipped`` further on than :func:`first_row`. The ranks of
    a context group read the same rows and a slice of each, so that a step has the same tokens whatever the layout.
    """
    first = skipped + first_row(step, microbatch, data_rank, train, parallel)
    return TokenTable(tokens, train, parallel, context_rank).rows(first, train.micro_batch_size)[:2]


def first_row(step: int, microbatch: int, data_rank: int, train: TrainConfig, parallel: ParallelConfig) -> int:
    """Where a microbatch begins; ``step`` and ``microbatch`` count from 0. Global microbatch
    ``g = (step * gradient_accumulation_steps + microbatch) * data + data_rank`` takes rows ``[g * b, (g + 1) * b)``.
    """
    index = (step * train.gradient_accumulation_steps + microbatch) * parallel.data + data_rank
    return index * train.micro_batch_size


def rows_per_step(train: TrainConfig, parallel: ParallelConfig) -> int:
    """Rows in the global batch of one step."""
    return train.micro_batch_size * train.gradient_accumulation_steps * parallel.data


def table_fingerprint(tokens: np.ndarray) -> str:
    """Shape, dtype and MD5 of a sample of the rows, so that a table of any size is told at once from another."""
    rows = np.ascontiguousarray(tokens[:: max(len(tokens) // 64, 1)])
    return f"{list(tokens.shape)} {tokens.dtype} {hashlib.md5(rows.tobytes()).hexdigest()}"


def _read_npy(path: Path, vocab_size: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever numpy's parser of headers lets through: TokenError, OverflowError, ...
        what = " ".join(str(error).split())[:200]
        raise UserError(f"tokens = {str(path)!r}: is not a readable .npy file ({what})") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"tokens = {str(path)!r}: is not an .npy file but an archive of several")
    if tokens.dtype.kind not in "iu":  # numpy counts time spans among integers
        raise UserError(f"tokens = {str(path)!r}: has dtype {tokens.dtype}, must hold integers")
    return tokens


def _read_bin(path: Path, vocab_size: int) -> np.ndarray:
    dtype = np.dtype("<u2" if vocab_size <= UINT16_TOKENS else "<u4")
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise UserError(
            f"tokens = {str(path)!r}: has {size} bytes, must be a positive multiple of {dtype.itemsize} "
            f"({dtype.name} for vocab_size = {vocab_size})"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _cut(tokens: np.ndarray, sequence_length: int, path: Path) -> np.ndarray:
    if len(tokens) <= sequence_length:
        raise UserError(
            f"tokens = {str(path)!r}: has {len(tokens)} tokens, one row needs sequence_length + 1 = "
            f"{sequence_length + 1}"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
