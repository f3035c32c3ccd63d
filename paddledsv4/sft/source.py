"""Documents as an endless list of packed sequences, which the trainer takes its microbatches from."""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.sft.dataset import Document
from paddledsv4.sft.packing import collate, pack
from paddledsv4.training.data import Microbatch


class PackedSource:
    """Every epoch has all documents once, packed anew. Any row can be asked for: a resumed run needs its number only.

    Args:
        documents: each at most ``sequence_length`` tokens long.
        seed: decides with the number of the epoch which documents go together, and the order.
        multiple: sequences are padded to a multiple of so many tokens, or to ``sequence_length`` where that is less.
        pad_id: the id in padding.

    Raises:
        UserError: a document is too long, or there is none.
    """

    def __init__(
        self, documents: Sequence[Document], sequence_length: int, seed: int = 0, multiple: int = 1, pad_id: int = 1
    ):
        if not documents:
            raise UserError("there is no conversation to pack")
        self.documents, self.sequence_length = documents, sequence_length
        self.seed, self.multiple, self.pad_id = seed, multiple, pad_id
        self._firsts = [0]  # row at which every epoch begins
        self.sequences = functools.lru_cache(maxsize=2)(self._pack)
        self.sequences(0)

    def __len__(self) -> int:
        """Rows of the first epoch."""
        return len(self.sequences(0))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sizes, and the MD5 of all that decides the rows."""
        digest = hashlib.md5(repr((self.sequence_length, self.seed, self.multiple, self.pad_id)).encode())
        for document in self.documents:
            digest.update(document.token_ids.tobytes() + document.loss_mask.tobytes())
        return f"{len(self.documents)} documents {digest.hexdigest()}"

    def _pack(self, epoch: int) -> list[list[int]]:
        """Indices of documents by row."""
        return pack([len(document) for document in self.documents], self.sequence_length, (self.seed, epoch))

    def locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its number in it."""
        while self._firsts[-1] <= row:
            self._firsts.append(self._firsts[-1] + len(self.sequences(len(self._firsts) - 1)))
        epoch = bisect_right(self._firsts, row) - 1
        return epoch, row - self._firsts[epoch]

    def rows(self, first: int, count: int) -> Microbatch:
        """Sequences [count, length], padded to the least length that holds the longest."""
        places = [self.locate(row) for row in range(first, first + count)]
        chosen = [[self.documents[i] for i in self.sequences(epoch)[row]] for epoch, row in places]
        longest = max(sum(map(len, sequence)) for sequence in chosen)
        length = min(-(-longest // self.multiple) * self.multiple, self.sequence_length)
        batch = collate(chosen, length, self.pad_id)
        return Microbatch(batch.tokens, batch.labels, batch.loss_mask, batch.cu_seqlens)


def hold_out(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(rest, about ``share`` of the documents, drawn by ``seed``), both in the order of the file.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = max(round(share * len(documents)), 1) if share else 0
    if count >= len(documents):
        raise UserError(f"data.held_out = {share}: leaves none of {len(documents)} conversations to train on")
    held = set(np.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    return [document for i, document in enumerate(documents) if i not in held], [documents[i] for i in sorted(held)]
