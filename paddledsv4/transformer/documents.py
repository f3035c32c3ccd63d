"""Several documents in one sequence. Attention sees each alone; everything else works on tokens and sees no difference.

Documents of one length are put side by side as the rows of a batch, and go through attention like any batch: windows,
groups of the compressor, choices of the indexer and rotary positions begin anew because the sequence does, in every
variant of every op. Nothing is padded. Where every row of a batch is one document, it is all the identity.

Losses that are means over a sequence become means over documents: one of L tokens weighs L / tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.distributed.group import ALONE
from paddledsv4.errors import UserError
from paddledsv4.numerics.function import differentiable


@dataclass(frozen=True)
class Part:
    """Documents of one length, the rows of a batch: their positions, and their share of all tokens."""

    sequence: SequenceSlice
    share: float = 1.0


class WholeRows:
    """Every row is one document, of which context ranks may have slices."""

    def parts(self, sequence: SequenceSlice) -> list[Part]:
        """The batches that attention takes one after the other; ``sequence``: what this rank has of a row."""
        return [Part(sequence)]

    def longest(self, sequence: SequenceSlice) -> int:
        """Tokens of the longest document."""
        return sequence.whole

    def apart(self, x: Tensor) -> Sequence[Tensor]:
        """x [s, b, ...] -> for each part [length, documents, ...]."""
        return [x]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`apart`."""
        return parts[0]

    def roll_left(self, x: Tensor, sequence: SequenceSlice) -> Tensor:
        """x [b, s] -> [b, s]: every position takes its right neighbour's value, the last of a document 0. Not
        differentiated."""
        return sequence.roll_left(x)


WHOLE_ROWS = WholeRows()


class PackedDocuments(WholeRows):
    """Documents side by side in rows.

    Args:
        cu_seqlens: for each row the ascending positions [documents + 1] where documents begin, 0 first, and the row's
            length last, which is the same for all rows.

    Raises:
        UserError: they are not like that.
    """

    def __init__(self, cu_seqlens: Sequence[np.ndarray]):
        rows = [np.asarray(bounds, np.int64) for bounds in cu_seqlens]
        if not rows or any(b.ndim != 1 or len(b) < 2 or b[0] != 0 or (np.diff(b) < 1).any() for b in rows):
            raise UserError("cu_seqlens must ascend from 0 to the length of the sequence, for every row of the batch")
        if len({int(bounds[-1]) for bounds in rows}) > 1:
            raise UserError("cu_seqlens must end with one length for all rows of the batch")
        self.rows, self.length = len(rows), int(rows[0][-1])
        places: dict[int, list[np.ndarray]] = {}
        for row, bounds in enumerate(rows):
            for start, stop in zip(bounds, bounds[1:], strict=False):
                places.setdefault(int(stop - start), []).append(np.arange(start, stop) * self.rows + row)
        self.shapes = [(length, len(documents)) for length, documents in sorted(places.items())]
        order = np.concatenate([np.stack(places[length], 1).ravel() for length, _ in self.shapes])
        self.order, self.inverse = paddle.to_tensor(order), paddle.to_tensor(np.argsort(order))
        self.lasts = paddle.to_tensor(np.stack([np.isin(np.arange(self.length) + 1, bounds) for bounds in rows]))

    def parts(self, sequence: SequenceSlice) -> list[Part]:
        """As above.

        Raises:
            UserError: context ranks cut the sequence, or it is of another length.
        """
        if sequence.ranks > 1:
            raise UserError("packed documents cannot be cut over context ranks; set parallel.context to 1")
        if sequence.length != self.length:
            raise UserError(f"cu_seqlens end at {self.length}, the sequences have {sequence.length} tokens")
        tokens = self.length * self.rows
        return [Part(SequenceSlice(ALONE.context, n), n * count / tokens) for n, count in self.shapes]

    def longest(self, sequence: SequenceSlice) -> int:
        return self.shapes[-1][0]

    def apart(self, x: Tensor) -> Sequence[Tensor]:
        return _apart(x, documents=self)

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        return _together(*parts, documents=self)

    def roll_left(self, x: Tensor, sequence: SequenceSlice) -> Tensor:
        return paddle.masked_fill(sequence.roll_left(x), self.lasts, 0)

    def _cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """[s, b, ...] -> the parts."""
        rest = x.shape[2:]
        rows = paddle.gather(x.reshape([-1, *rest]), self.order)
        pieces = paddle.split(rows, [length * count for length, count in self.shapes])
        return tuple(piece.reshape([*shape, *rest]) for piece, shape in zip(pieces, self.shapes, strict=True))

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts -> [s, b, ...]."""
        rest = parts[0].shape[2:]
        rows = paddle.concat([part.reshape([-1, *rest]) for part in parts], 0)
        return paddle.gather(rows, self.inverse).reshape([self.length, self.rows, *rest])


def documents_of(cu_seqlens: Sequence[np.ndarray] | None) -> WholeRows:
    """Where documents begin in a batch; None: each row is one.

    Raises:
        UserError: as :class:`PackedDocuments`.
    """
    return WHOLE_ROWS if cu_seqlens is None else PackedDocuments(cu_seqlens)


@differentiable
def _apart(x: Tensor, documents: PackedDocuments):
    return documents._cut(x), lambda *gradients: (documents._join(gradients),)


@differentiable
def _together(*parts: Tensor, documents: PackedDocuments):
    return documents._join(parts), documents._cut
