"""Cross entropy over a vocabulary of which every tensor rank has its part of the logits.

It follows the switch ``cross_entropy``: the variant chosen there is taken here, ``paddle`` where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle
from paddle import Tensor

from paddledsv4.distributed.group import Group
from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import follower
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_sum
from paddledsv4.tensor_parallel.layers import own_ids
from paddledsv4.transformer.build import Build

vocab_parallel = follower("vocab_parallel_cross_entropy", "cross entropy, by parts of the vocabulary", spec="11",
                          follows="cross_entropy", outputs=("loss",), wide=("loss",))


def cross_entropy(build: Build) -> Callable[[Tensor, Tensor], Tensor]:
    """logits [s, b, V or this rank's part], labels [b, s] -> losses [b, s], for the tensor group of this build."""
    group = build.groups.tensor
    if group.size == 1:
        return build.ops.cross_entropy
    return functools.partial(build.follow(vocab_parallel), group=group)


@vocab_parallel.variant("paddle", "softmax kept for a hand-written backward")
@differentiable
def paddle_vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group):
    """logits [s, b, V / ranks], labels [b, s] -> losses [b, s] in float32 or wider, the same on every rank.

    Three sums over ranks of one number per token: of maxima, of the label's logit, of the exponentials.
    """
    local, here = own_ids(labels.t().unsqueeze(-1), logits.shape[-1], group)
    x = widen(logits)
    here = here.astype(x.dtype)
    x = x - group.all_reduce_(x.max(-1, keepdim=True), "max")
    p = paddle.exp(x)
    label = paddle.take_along_axis(x, local, -1) * here
    label, total = group.all_reduce_(paddle.stack([label, row_sum(p)]))
    loss = paddle.log(total) - label
    p = p / total

    def backward(dloss):
        seed = dloss.t().unsqueeze(-1)
        g = paddle.put_along_axis(p * seed, local, -seed * here, -1, reduce="add")
        return g.astype(logits.dtype), None

    return loss.squeeze(-1).t(), backward


@megatron_order(vocab_parallel, "max, subtract, label's logit, exp, sum: each of the three reduced over ranks",
                explicit=True)
def megatron_vocab_parallel_cross_entropy(K, logits, labels, group):
    columns = logits.shape[-1]
    local = K.permute(labels, 1, 0).unsqueeze(-1) - group.rank * columns
    elsewhere = K.logical_not(K.logical_and(local >= 0, local < columns))
    local = K.masked_fill(local, elsewhere, 0)
    x = K.wide(logits)
    x = x - K.all_reduce(K.max(x, -1, keepdim=True), group, "max")
    predicted = K.masked_fill(K.gather(x, -1, local), elsewhere, 0.0).squeeze(-1)
    x = K.exp(x)
    total = K.sum(x, -1)
    predicted, total = K.all_reduce(predicted, group), K.all_reduce(total, group)
    loss = K.log(total) - predicted
    x = x / total.unsqueeze(-1)

    def backward(dloss):
        one = K.masked_fill(K.full(list(local.shape), 1.0, K.dtype(x), like=x), elsewhere, 0.0)
        g = K.scatter(x, -1, local, K.gather(x, -1, local) - one)
        return K.cast(g * K.permute(dloss, 1, 0).unsqueeze(-1), K.dtype(logits)), None

    return K.contiguous(K.permute(loss, 1, 0)), backward
