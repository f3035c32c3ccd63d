"""Documents side by side in sequences: which go together, what the model is given, where one document ends."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.sft.dataset import Document


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of one microbatch, padded to a common length, the least that holds the longest.

    Attributes:
        tokens: [batch, length] int64.
        labels: [batch, length] int64, the next token of the same document. A document's last position has none: it
            holds the padding id and is not trained.
        loss_mask: [batch, length] float32, 1 where the label is trained.
        position_ids: [batch, length] int64, counted from 0 in every document, the padding included.
        cu_seqlens: for each sequence int32 [documents + 1], ascending from 0 to length: document d holds positions
            ``cu_seqlens[d]`` up to ``cu_seqlens[d + 1]``. Padding is a document of its own at the end.
        numbers: for each sequence the row numbers of its documents, in order; padding has none.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: list[np.ndarray]
    numbers: list[list[int]]

    @property
    def document_ids(self) -> np.ndarray:
        """[batch, length] int32: which document of its sequence a position belongs to."""
        return np.stack([np.repeat(np.arange(len(b) - 1, dtype=np.int32), np.diff(b)) for b in self.cu_seqlens])

    @property
    def real_tokens(self) -> int:
        """How many positions are not padding."""
        return sum(int(b[len(n)]) for b, n in zip(self.cu_seqlens, self.numbers, strict=True))


def pack(lengths: Sequence[int], capacity: int, seed: int | Sequence[int] = 0) -> list[list[int]]:
    """Indices of documents by sequence: best fit decreasing, every document once, in an order drawn from ``seed``.

    The longest come first, equal lengths in random order, each into the fullest sequence that still has room.
    Sequences, and documents within them, are then shuffled. ``seed`` may be several numbers, such as (seed, epoch).

    Raises:
        UserError: a document longer than ``capacity`` tokens, or without any.
    """
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= capacity:
        bad = next(n for n in lengths if not 1 <= n <= capacity)
        raise UserError(f"a document has {bad} tokens, a sequence holds 1 to {capacity}")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(lengths))
    room: list[tuple[int, int]] = []  # (free tokens, sequence), ascending
    sequences: list[list[int]] = []
    for index in shuffled[np.argsort(-np.asarray(lengths)[shuffled], kind="stable")].tolist():
        length = lengths[index]
        at = bisect_left(room, (length, -1))
        if at == len(room):
            free, target = capacity, len(sequences)
            sequences.append([])
        else:
            free, target = room.pop(at)
        sequences[target].append(index)
        if free > length:
            insort(room, (free - length, target))
    for sequence in sequences:
        random.shuffle(sequence)
    return [sequences[i] for i in random.permutation(len(sequences))]


def packed_batches(
    documents: Sequence[Document],
    sequence_length: int,
    micro_batch_size: int = 1,
    seed: int | Sequence[int] = 0,
    multiple: int = 1,
    pad_id: int = 1,
) -> Iterator[PackedBatch]:
    """Microbatches of packed sequences of at most ``sequence_length`` tokens; the last may have fewer sequences.

    Args:
        documents: each at most ``sequence_length`` tokens long.
        multiple: pad to a multiple of this many tokens, or to ``sequence_length`` where that is less.
        pad_id: the id in padding; 1 is DeepSeek's end of sentence, as in its tokenizer_config.json.

    Raises:
        UserError: a document is too long; the message has its row.
    """
    for document in documents:
        if len(document) > sequence_length:
            raise UserError(
                f"row {document.number} has {len(document)} tokens, more than sequence_length = {sequence_length}; "
                "set max_tokens to it and skip_invalid to leave such rows out"
            )
    sequences = pack([len(document) for document in documents], sequence_length, seed)
    for first in range(0, len(sequences), micro_batch_size):
        chosen = [[documents[i] for i in sequence] for sequence in sequences[first : first + micro_batch_size]]
        longest = max(sum(map(len, sequence)) for sequence in chosen)
        yield collate(chosen, min(-(-longest // multiple) * multiple, sequence_length), pad_id)


def collate(sequences: Sequence[Sequence[Document]], length: int, pad_id: int = 1) -> PackedBatch:
    """Put the documents of each sequence side by side and pad to ``length`` tokens."""
    shape = (len(sequences), length)
    tokens, labels = np.full(shape, pad_id, np.int64), np.full(shape, pad_id, np.int64)
    mask, positions, bounds = np.zeros(shape, np.float32), np.zeros(shape, np.int64), []
    for row, documents in enumerate(sequences):
        ends = np.cumsum([0, *map(len, documents)])
        for document, start, end in zip(documents, ends, ends[1:], strict=False):
            tokens[row, start:end] = document.token_ids
            labels[row, start : end - 1] = document.token_ids[1:]
            mask[row, start : end - 1] = document.loss_mask[1:]
        cuts = np.unique([*ends, length]).astype(np.int32)
        positions[row] = np.arange(length) - np.repeat(cuts[:-1], np.diff(cuts))
        bounds.append(cuts)
    numbers = [[document.number for document in documents] for documents in sequences]
    return PackedBatch(tokens, labels, mask, positions, bounds, numbers)


def efficiency(batches: Iterable[PackedBatch]) -> float:
    """The share of positions given to the model that are not padding."""
    real, all_positions = 0, 0
    for batch in batches:
        real, all_positions = real + batch.real_tokens, all_positions + batch.tokens.size
    return real / all_positions
