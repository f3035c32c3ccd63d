"""The balance loss of whole sequences (spec 9.3), of which a rank may have a slice only.

The layer is given one of these when it is built. Both: logits [s, b, E] -> loss [1].
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.transformer.build import Build, ForwardContext


def sequence_loss(build: Build) -> Callable[[Tensor, float, ForwardContext], Tensor]:
    """The loss for the context group of this build."""
    kind = WholeSequenceLoss if build.groups.context.size == 1 else SliceLoss
    return kind(build.ops, build.config.num_experts_per_tok)


class WholeSequenceLoss:
    """The op: all tokens are here. Of a packed sequence every document is one of its own."""

    def __init__(self, ops, topk: int):
        self.ops, self.topk = ops, topk

    def __call__(self, logits: Tensor, coeff: float, context: ForwardContext) -> Tensor:
        """logits [s, b, E] -> loss [1]."""
        parts = zip(context.documents.parts(context.sequence), context.documents.apart(logits), strict=True)
        losses = (
            self.ops.sequence_aux_loss(x.reshape([-1, x.shape[2]]), x.shape[1], self.topk, coeff * part.share)
            for part, x in parts
        )
        return functools.reduce(operator.add, losses)


class SliceLoss(WholeSequenceLoss):
    """The term of this slice's affinities, with the token counts of the whole sequence, as Megatron has it.

    The terms of all slices sum up to the loss of the sequence; gradients are averaged, so it is seeded by the number
    of slices more.
    """

    def __call__(self, logits: Tensor, coeff: float, context: ForwardContext) -> Tensor:
        """As :class:`WholeSequenceLoss`, of the tokens of this slice."""
        [part] = context.documents.parts(context.sequence)
        sequences, sequence = logits.shape[1], part.sequence
        logits = logits.reshape([-1, logits.shape[2]])
        elsewhere = sequence.elsewhere(self._counts(logits, sequences))
        return self.ops.sequence_aux_loss(logits, sequences, self.topk, coeff, elsewhere, slices=sequence.ranks)

    @paddle.no_grad()
    def _counts(self, logits: Tensor, sequences: int) -> Tensor:
        """[b * E] int64: how many tokens of this slice have an expert among their best ones, without the bias."""
        index = self.ops.router_topk(self.ops.router_scores(logits.detach()), None, self.topk)
        chosen = F.one_hot(index, logits.shape[1]).sum(1).astype("int64")
        return chosen.reshape([-1, sequences * logits.shape[1]]).sum(0)
