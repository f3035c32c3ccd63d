"""From hidden states to losses: the head and its cross entropy, as two ops or as one that never has the logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from paddle import Tensor

from paddledsv4.errors import UserError
from paddledsv4.fusions.linear_cross_entropy import linear_cross_entropy
from paddledsv4.tensor_parallel.layers import ColumnParallelLinear
from paddledsv4.transformer.build import Build

HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def head_loss(build: Build, ops: SimpleNamespace, head: ColumnParallelLinear, fused: bool) -> HeadLoss:
    """hidden [s, b, C] at rest, weight of the head [V, C], labels and mask [b, s] -> losses [b, s], whose gradient has
    to be a multiple of the mask.

    The ``fused`` form takes the variant that the switch ``cross_entropy`` names, ``paddle`` where it has none.

    Raises:
        UserError: ``fused``, and tensor ranks share the vocabulary.
    """
    if fused and build.groups.tensor.size > 1:
        raise UserError(
            "training.linear_cross_entropy = True: not with parallel.tensor > 1, whose ranks have a part of the logits "
            "each; set it to false"
        )
    if fused:
        ops.linear_cross_entropy = build.follow(linear_cross_entropy)
        return lambda hidden, weight, labels, mask: ops.linear_cross_entropy(hidden, weight, labels, mask=mask)
    enter = build.tensor.enter
    return lambda hidden, weight, labels, mask: ops.cross_entropy(head(enter(hidden), weight), labels)
