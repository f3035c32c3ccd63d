"""Cross entropy of every token from its logits."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_sum

cross_entropy = define("cross_entropy", "negative log-likelihood of the labels", spec="11", outputs=("loss",),
                       wide=("loss",))


@cross_entropy.variant("paddle", "softmax kept for a hand-written backward")
@differentiable
def paddle_cross_entropy(logits: Tensor, labels: Tensor):
    """logits [s, b, V], labels [b, s] -> losses [b, s] in float32 or wider."""
    target = labels.t().unsqueeze(-1)
    x = widen(logits)
    x = x - x.max(-1, keepdim=True)
    p = paddle.exp(x)
    total = row_sum(p)
    loss = paddle.log(total) - paddle.take_along_axis(x, target, -1)
    p = p / total

    def backward(dloss):
        seed = dloss.t().unsqueeze(-1)
        g = paddle.put_along_axis(p * seed, target, -seed, -1, reduce="add")
        return g.astype(logits.dtype), None

    return loss.squeeze(-1).t(), backward


@cross_entropy.variant("plain", "F.cross_entropy")
def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    x = widen(logits).transpose([1, 0, 2])
    return F.cross_entropy(x, labels.unsqueeze(-1), reduction="none", axis=-1).squeeze(-1)


@megatron_order(cross_entropy, "log(sum exp(x - max)) - (x - max)[label]; backward subtracts one, then scales",
                explicit=True)
def megatron_cross_entropy(K, logits, labels):
    target = K.permute(labels, 1, 0).unsqueeze(-1)
    x = K.wide(logits)
    x = x - K.max(x, -1, keepdim=True)
    predicted = K.gather(x, -1, target).squeeze(-1)
    x = K.exp(x)
    total = K.sum(x, -1)
    loss = K.log(total) - predicted
    x = x / total.unsqueeze(-1)

    def backward(dloss):
        g = K.scatter(x, -1, target, K.gather(x, -1, target) - 1.0)
        return K.cast(g * K.permute(dloss, 1, 0).unsqueeze(-1), K.dtype(logits)), None

    return K.contiguous(K.permute(loss, 1, 0)), backward
