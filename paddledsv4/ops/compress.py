"""Compressor pooling: each group of ``ratio`` tokens becomes one key-value entry by a softmax over its positions."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
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


def _overlap_backward(g: Tensor) -> Tensor:
    """[g, 2r, b, d] -> [g, r, b, 2d]: the first half belongs to the previous group; the last group gave none away."""
    ratio = g.shape[1] // 2
    first = paddle.concat([g[1:, :ratio], paddle.zeros_like(g[:1, :ratio])], 0)
    return paddle.concat([first, g[:, ratio:]], -1)


def _windows(kv: Tensor, score: Tensor, ape: Tensor, ratio: int, overlap: bool) -> tuple[Tensor, Tensor]:
    """Features and scores of every window, each [g, r or 2r, b, d], in float32 or wider."""
    s, b, width = kv.shape
    groups = s // ratio
    grouped = [groups, ratio, b, width]
    kv = widen(kv[: groups * ratio]).reshape(grouped)
    position = widen(ape).reshape([1, ratio, 1, width]).expand(grouped)
    score = widen(score[: groups * ratio]).reshape(grouped) + position
    return (_overlap(kv, 0.0), _overlap(score, NEVER)) if overlap else (kv, score)


@compress.variant("paddle", "softmax in float32 or wider, hand-written backward")
@differentiable
def paddle_compress(kv: Tensor, score: Tensor, ape: Tensor, ratio: int, overlap: bool):
    """kv and score [s, b, c*d], ape [ratio, c*d], c = 2 with overlap else 1 -> [s // ratio, b, d].

    The s % ratio last tokens are not pooled. Group 0 has no previous group: its first half weighs nothing.
    """
    windows, logits = _windows(kv, score, ape, ratio, overlap)
    weight = F.softmax(logits, 1)
    out = (windows * weight).sum(1)

    def backward(dout):
        dkv = widen(dout).unsqueeze(1).expand(weight.shape) * weight
        dscore = dkv * (windows - out.unsqueeze(1).expand(windows.shape))
        if overlap:
            dkv, dscore = _overlap_backward(dkv), _overlap_backward(dscore)
        dape = dscore.sum([0, 2])
        rest = paddle.zeros([kv.shape[0] % ratio, *kv.shape[1:]], dkv.dtype)
        dkv, dscore = (paddle.concat([g.reshape([-1, *kv.shape[1:]]), rest], 0) for g in (dkv, dscore))
        return dkv.astype(kv.dtype), dscore.astype(score.dtype), dape.astype(ape.dtype)

    return out.astype(kv.dtype), backward


@compress.variant("plain", "the formula, differentiated by autograd")
def plain_compress(kv: Tensor, score: Tensor, ape: Tensor, ratio: int, overlap: bool) -> Tensor:
    windows, logits = _windows(kv, score, ape, ratio, overlap)
    return (windows * F.softmax(logits, 1)).sum(1).astype(kv.dtype)


@megatron_order(compress, "score + ape, softmax over positions in float32, product in the dtype of kv, sum")
def megatron_compress(K, kv, score, ape, ratio, overlap):
    s, b, width = kv.shape
    groups = s // ratio
    kv = kv[: groups * ratio].reshape([groups, ratio, b, width])
    score = score[: groups * ratio].reshape([groups, ratio, b, width]) + ape.reshape([1, ratio, 1, width])
    if overlap:
        kv, score = _overlap_on(K, kv, 0.0), _overlap_on(K, score, float("-inf"))
    weight = K.cast(K.softmax(K.wide(score), 1), K.dtype(kv))
    return K.sum(kv * weight, 1)


def _overlap_on(K, x, fill):
    d = x.shape[-1] // 2
    groups, ratio, b, _ = x.shape
    start = K.full([1, ratio, b, d], fill, K.dtype(x), like=x)
    return K.cat([K.cat([start, x[:-1, :, :, :d]], 0), x[:, :, :, d:]], 1)
