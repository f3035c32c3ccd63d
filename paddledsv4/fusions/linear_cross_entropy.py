"""Head and cross entropy in one: the logits [tokens, vocabulary] never exist at once.

It follows the switch ``cross_entropy``: the variant chosen there is taken here, ``paddle`` where there is none.

A pass over the logits takes blocks of at most ``BLOCK`` elements. Forward, each block is some tokens and the whole
vocabulary, so that every token's sum has its usual order; of a token its largest logit and its sum are kept. Backward,
the logits are computed again.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check_rows, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import follower
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_sum

BLOCK = 1 << 24  # elements: 64 MiB in float32
ROWS = 64  # blocks have a multiple of so many rows, but for the last one

linear_cross_entropy = follower("linear_cross_entropy", "cross entropy of a linear head, without its logits", spec="11",
                                follows="cross_entropy", outputs=("loss",), wide=("loss",))


def blocks(total: int, width: int) -> list[slice]:
    """Slices of ``total`` rows of ``width`` elements. The last one takes a short rest along: GEMMs of few rows run on
    other kernels, with other bits."""
    size = max(BLOCK // width // ROWS, 1) * ROWS
    starts = list(range(0, max(total - ROWS, 0) + 1, size))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], total], strict=True)]


@linear_cross_entropy.variant("paddle", "blocks of tokens; backward computes the logits once more")
@differentiable
def paddle_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, mask: Tensor | None = None):
    """hidden [s, b, C], weight [V, C], labels [b, s] -> losses [b, s] in float32 or wider.

    mask [b, s]: says that the losses' gradient will be a multiple of it, for the variants that can use that.
    """
    s, b, width = hidden.shape
    x, target = hidden.reshape([-1, width]), labels.t().reshape([-1, 1])
    logits = lambda rows: widen(paddle.matmul(x[rows], weight, transpose_y=True))  # noqa: E731
    losses, logs = [], []
    for rows in blocks(s * b, weight.shape[0]):
        block = logits(rows)
        top = block.max(-1, keepdim=True)
        logs.append(top + paddle.log(row_sum(paddle.exp(block - top))))
        losses.append(logs[-1] - paddle.take_along_axis(block, target[rows], -1))

    def backward(dloss):
        seed, dx, dw = dloss.t().reshape([-1, 1]), [], None
        for rows, log in zip(blocks(s * b, weight.shape[0]), logs, strict=True):
            g = paddle.exp(logits(rows) - log) * seed[rows]
            g = paddle.put_along_axis(g, target[rows], -seed[rows], -1, reduce="add").astype(hidden.dtype)
            dx.append(paddle.matmul(g, weight))
            part = widen(paddle.matmul(g, x[rows], transpose_x=True))
            dw = part if dw is None else dw.add_(part)
        return paddle.concat(dx).reshape(hidden.shape), dw.astype(weight.dtype), None

    return paddle.concat(losses).reshape([s, b]).t(), backward


@linear_cross_entropy.variant("plain", "one block, differentiated by autograd")
def plain_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    logits = widen(paddle.matmul(hidden, weight, transpose_y=True))
    loss = paddle.logsumexp(logits, -1) - paddle.take_along_axis(logits, labels.t().unsqueeze(-1), -1).squeeze(-1)
    return loss.t()


@megatron_order(
    linear_cross_entropy, "bits of linear and cross_entropy: dx by blocks of tokens, dW by blocks of the vocabulary",
    explicit=True,
)
def megatron_linear_cross_entropy(K, hidden, weight, labels, *, mask=None):
    s, b, width = hidden.shape
    tokens, vocabulary = s * b, weight.shape[0]
    x, target = hidden.reshape([tokens, width]), K.permute(labels, 1, 0).reshape([tokens, 1])

    def logits(rows, columns=slice(None)):
        return K.wide(K.matmul(x[rows], K.permute(weight[columns], 1, 0)))

    losses, tops, totals = [], [], []
    for rows in blocks(tokens, vocabulary):
        block = logits(rows)
        tops.append(K.max(block, -1, keepdim=True))
        block = block - tops[-1]
        predicted = K.gather(block, -1, target[rows]).squeeze(-1)
        totals.append(K.sum(K.exp(block), -1).unsqueeze(-1))
        losses.append(K.log(totals[-1].squeeze(-1)) - predicted)
    top, total = K.cat(tops, 0), K.cat(totals, 0)

    def backward(dloss):
        seed = K.permute(dloss, 1, 0).reshape([tokens, 1])

        def gradient(rows, columns, label, ones):
            p = K.exp(logits(rows, columns) - top[rows]) / total[rows]
            p = K.scatter(p, -1, label, K.gather(p, -1, label) - ones)
            return K.cast(p * seed[rows], K.dtype(hidden))

        one = K.full([tokens, 1], 1.0, K.dtype(top), like=top)
        dx = [K.matmul(gradient(rows, slice(None), target[rows], one[rows]), weight)
              for rows in blocks(tokens, vocabulary)]
        dw = []
        for columns in blocks(vocabulary, tokens):
            here = K.logical_and(target >= columns.start, target < columns.stop)
            label = K.masked_fill(target - columns.start, K.logical_not(here), 0)
            g = gradient(slice(None), columns, label, K.masked_fill(one, K.logical_not(here), 0.0))
            dw.append(K.matmul(K.permute(g, 1, 0), x))
        return K.cat(dx, 0).reshape([s, b, width]), K.cat(dw, 0), None

    return K.contiguous(K.permute(K.cat(losses, 0).reshape([s, b]), 1, 0)), backward


@linear_cross_entropy.variant("fused", "Triton kernels: logits in registers, or three products where a mask is known",
                              needs="triton", refuses=refusal)
def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """hidden [s, b, C], weight [V, C], labels [b, s] -> losses [b, s] in float32.

    mask [b, s]: says that the losses' gradient will be a multiple of it. Both gradients are then computed with the
    losses, and the logits once instead of twice. Where the gradient is none, theirs are NaN.

    Raises:
        UserError: hidden and weight are not both float32 or both bfloat16, or their rows have no multiple of 16 bytes.
    """
    check_rows("the fused linear_cross_entropy", hidden, weight)
    train = not weight.stop_gradient
    wanted = paddle.is_grad_enabled() and (train or not hidden.stop_gradient)
    if wanted and mask is not None:
        return _at_once(hidden, weight, labels, mask=mask, train=train)
    return _later(hidden, weight, labels, train=train)


@differentiable
def _later(hidden: Tensor, weight: Tensor, labels: Tensor, *, train: bool):
    """The gradients when that of the losses is there."""
    from paddledsv4.kernels import linear_cross_entropy as kernel

    s, b, width = hidden.shape
    x, target = hidden.reshape([-1, width]), labels.t().reshape([-1])
    losses, logs = kernel.forward(CARRIER, x, weight, target)

    def backward(dloss):
        dx, dw = kernel.backward(CARRIER, dloss.t().reshape([-1]), x, weight, target, logs, train)
        return dx.reshape(hidden.shape), dw, None

    return losses.reshape([s, b]).t(), backward


@differentiable
def _at_once(hidden: Tensor, weight: Tensor, labels: Tensor, *, mask: Tensor, train: bool):
    """The gradients of sum(losses mask), to be multiplied with what comes."""
    from paddledsv4.kernels.head_gradients import losses_and_gradients
    from paddledsv4.kernels.scale import times

    s, b, width = hidden.shape
    mask = mask.astype("float32")
    losses, dx, dw = losses_and_gradients(
        CARRIER, hidden.reshape([-1, width]), weight, labels.t().reshape([-1]), mask.t().reshape([-1]), train
    )

    def backward(dloss):
        factor = multiple(dloss, mask)
        return times(CARRIER, dx, factor).reshape(hidden.shape), times(CARRIER, dw, factor) if train else None, None

    return losses.reshape([s, b]).t(), backward


def multiple(values: Tensor, mask: Tensor) -> Tensor:
    """The factor by which values are the mask, NaN if there is none; a tensor, so that no one waits for the device."""
    factor = (values * mask).sum() / (mask * mask).sum().clip(min=1e-30)
    off = (values - factor * mask).abs().max() > 1e-5 * values.abs().max()
    return paddle.where(off, paddle.full_like(factor, float("nan")), factor)
