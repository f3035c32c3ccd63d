"""The balance loss of whole sequences (spec 9.3), of which a rank may have a slice only.

The layer is given one of two functions when it is built. Both take its ops and logits [s, b, E], and give a loss [1].
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.distributed.group import Group
from paddledsv4.transformer.build import ForwardContext

SequenceLoss = Callable[[SimpleNamespace, Tensor, int, float, ForwardContext], Tensor]


def sequence_loss(group: Group) -> SequenceLoss:
    """The loss where the ranks of ``group`` share every sequence."""
    return whole_sequence_loss if group.size == 1 else slice_loss


def whole_sequence_loss(
    ops: SimpleNamespace, logits: Tensor, topk: int, coeff: float, context: ForwardContext
) -> Tensor:
    """All tokens are here. Of a packed sequence every document is one of its own."""
    parts = zip(context.documents.parts(context.sequence), context.documents.apart(logits), strict=True)
    losses = (
        ops.sequence_aux_loss(x.reshape([-1, x.shape[2]]), x.shape[1], topk, coeff * part.share) for part, x in parts
    )
    return functools.reduce(operator.add, losses)


def slice_loss(ops: SimpleNamespace, logits: Tensor, topk: int, coeff: float, context: ForwardContext) -> Tensor:
    """The term of this slice's affinities, with the token counts of the whole sequence, as Megatron has it.

    The terms of all slices sum up to the loss of the sequence; gradients are averaged, so it is to be seeded by the
    number of slices more.
    """
    [part] = context.documents.parts(context.sequence)
    sequences, sequence = logits.shape[1], part.sequence
    logits = logits.reshape([-1, logits.shape[2]])
    elsewhere = sequence.elsewhere(_counts(ops, logits, sequences, topk))
    return ops.sequence_aux_loss(logits, sequences, topk, coeff, elsewhere, slices=sequence.ranks)


@paddle.no_grad()
def _counts(ops: SimpleNamespace, logits: Tensor, sequences: int, topk: int) -> Tensor:
    """[b * E] int64: how many tokens of this slice have an expert among their best ones, without the bias."""
    index = ops.router_topk(ops.router_scores(logits.detach()), None, topk)
    chosen = F.one_hot(index, logits.shape[1]).sum(1).astype("int64")
    return chosen.reshape([-1, sequences * logits.shape[1]]).sum(0)
