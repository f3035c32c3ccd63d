"""Compressor pooling: each group of ``ratio`` tokens becomes one key-value entry by a softmax over its positions."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen

compress = define("compress", "learned pooling of a window of tokens, with overlap for ratio 4", spec="7")

NEVER = -1e30  # a score that the softmax turns into an exact zero


def _overlap(x: Tensor, fill: float) -> Tensor:
    """[g, r, b, 2d] -> [g, 2r, b, d]: first half of the previous group's features, then second half of its own."""
    d = x.shape[-1] // 2
    first, second = x[..., :d], x[..., d:]
    previous = paddle.concat([paddle.full_like(first[:1], fill), first[:-1]], 0)
    return paddle.concat([previous, second], 1)


@compress.variant("paddle", "softmax in float32 or wider, differentiated by autograd")
def paddle_compress(kv: Tensor, score: Tensor, ape: Tensor, ratio: int, overlap: bool) -> Tensor:
    """kv and score [s, b, c*d], ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d].

    The s % ratio last tokens are not pooled. Group 0 has no previous group: its first half weighs nothing.
    """
    s, b, width = kv.shape
    groups = s // ratio
    grouped = [groups, ratio, b, width]
    kv = kv[: groups * ratio].reshape(grouped)
    score = score[: groups * ratio].reshape(grouped) + ape.reshape([1, ratio, 1, width])
    if overlap:
        kv, score = _overlap(kv, 0.0), _overlap(score, NEVER)
    weight = F.softmax(widen(score), 1).astype(kv.dtype)
    return (kv * weight).sum(1)
