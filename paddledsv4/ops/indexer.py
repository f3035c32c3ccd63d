"""The lightning indexer: scores of compressed entries, the causal choice of the best, and the loss that trains it."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.distributed.group import ALONE, Group
from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.registry import define
from paddledsv4.ops.attention_segments import NEVER, causal_mask
from paddledsv4.ops.precision import dtype_name, widen
from paddledsv4.ops.reduce import row_sum
from paddledsv4.ops.sparse_attention import batch_first, make_segments, row_chunks, selection_mask, whole_windows

indexer_score = define("indexer_score", "sum over heads of weight times ReLU(q k)", spec="8.2", outputs=("scores",),
                       wide=("scores",))
indexer_weights = define("indexer_weights", "weights of the indexer's heads, scaled by their number", spec="8.2",
                         outputs=("weights",))
indexer_topk = define("indexer_topk", "the best complete entries of every query", spec="8.2", outputs=("topk",))
indexer_loss = define("indexer_loss", "KL divergence from the attention's own weights to the indexer's", spec="8.3",
                      outputs=("loss",), wide=("loss",))


@indexer_weights.variant("paddle", "weights h^-1/2", same_bits="one product")
def paddle_indexer_weights(weights: Tensor, heads: int) -> Tensor:
    """weights [s, b, h] -> [s, b, h]."""
    return weights * heads**-0.5


@indexer_score.variant("paddle", "chunks of rows in float32 or wider; backward recomputes the products")
@differentiable
def paddle_indexer_score(query: Tensor, key: Tensor, weights: Tensor):
    """query [s, b, h, d], key [g, b, d], weights [s, b, h] -> scores [b, s, g], not masked.

    score = sum_h weights_h d^-1/2 ReLU(q_h k)
    """
    d_scale = query.shape[-1] ** -0.5
    q, k, w = batch_first(query), batch_first(key), batch_first(weights) * d_scale
    b, s, heads, d = q.shape
    groups = k.shape[1]
    chunks = row_chunks(s, 1, b * heads * groups)

    def products(rows):
        raw = paddle.matmul(q[:, rows].reshape([b, -1, d]), k, transpose_y=True)
        return F.relu(raw).reshape([b, -1, heads, groups])

    def score(rows):
        return paddle.matmul(w[:, rows].unsqueeze(2), products(rows)).squeeze(2)

    def backward(dscores):
        dq, dk, dw = [], paddle.zeros_like(k), []
        for r0, r1 in chunks:
            rows, raw = slice(r0, r1), products(slice(r0, r1))
            g = dscores[:, rows]
            dw.append(paddle.matmul(raw, g.unsqueeze(-1)).squeeze(-1))
            draw = paddle.matmul(w[:, rows].unsqueeze(-1), g.unsqueeze(2)) * (raw > 0).astype(raw.dtype)
            draw = draw.reshape([b, -1, groups])
            dq.append(paddle.matmul(draw, k).reshape([b, r1 - r0, heads, d]))
            dk += paddle.matmul(draw, q[:, rows].reshape([b, -1, d]), transpose_x=True)
        return (
            paddle.concat(dq, 1).transpose([1, 0, 2, 3]).astype(query.dtype),
            dk.transpose([1, 0, 2]).astype(key.dtype),
            (paddle.concat(dw, 1) * d_scale).transpose([1, 0, 2]).astype(weights.dtype),
        )

    return paddle.concat([score(slice(*chunk)) for chunk in chunks], 1), backward


@indexer_score.variant("plain", "einsums, differentiated by autograd")
def plain_indexer_score(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    raw = F.relu(paddle.einsum("sbhd,tbd->bsht", widen(query), widen(key)))
    return (raw * (batch_first(weights) * query.shape[-1] ** -0.5).unsqueeze(-1)).sum(2)


@indexer_topk.variant("paddle", "paddle.topk, best first", same_bits="the same choice unless scores tie")
def paddle_indexer_topk(scores: Tensor, topk: int, ratio: int, offset: int = 0) -> Tensor:
    """scores [b, s, g] -> [b, s, min(topk, g)] int32, -1: none.

    Row r is the query of position i = offset + r; entry c is complete there when c < (i+1) // ratio.
    """
    _, s, groups = scores.shape
    masked = scores + causal_mask(offset, offset + s, groups, ratio, dtype_name(scores))
    index = paddle.topk(masked, min(topk, groups), -1)[1]
    complete = ((paddle.arange(offset, offset + s) + 1) // ratio).reshape([1, s, 1])
    return paddle.where(index < complete, index, paddle.full_like(index, -1)).astype("int32")


def _teacher(query, kv, compressed, sink, selected, window, ratio, scale, sparse, offset, heads_of) -> Tensor:
    """[b, s, g or K]: attention weights of the compressed entries, summed over heads, normalised per query.

    ``sparse`` restricts the softmax's compressed part to the selected entries and returns those K only.
    """
    s, _, heads, _ = query.shape
    padded = whole_windows(s, window)
    segments = make_segments(kv, compressed, selected if sparse else None, s, window, ratio, offset)
    q = batch_first(query, padded) * scale
    sink_logit = widen(sink).reshape([1, 1, heads, 1])
    targets = []
    entries = compressed.shape[0]
    for r0, r1 in row_chunks(padded, window, q.shape[0] * heads * (2 * window + entries)):
        rows = q[:, r0:r1]
        scores = [segment.cut(r0, r1).scores(rows) for segment in segments]
        top = sink_logit
        for x in scores:
            top = paddle.maximum(top, x.max(-1, keepdim=True))
        total = paddle.exp(sink_logit - top) + row_sum(paddle.exp(scores[0] - top))
        weights = paddle.exp(scores[1] - top)
        total = total + row_sum(weights)
        targets.append((weights / total).sum(2))
    target = heads_of.all_reduce_(paddle.concat(targets, 1)[:, :s].contiguous())
    return target / target.sum(-1, keepdim=True).clip(min=1.1754944e-38)


def _divergence(scores: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(scores + mask)) per query [b, s], and that softmax, zero where masked."""
    visible = (mask == 0).astype(scores.dtype)
    logp = F.log_softmax(scores + mask, -1) * visible
    kl = (target * (paddle.log(target.clip(min=1e-10)) - logp)).sum(-1)
    return kl, paddle.exp(logp) * visible


@indexer_loss.variant("paddle", "on the selected entries only; hand-written backward")
@differentiable
def paddle_indexer_loss(
    scores: Tensor, query: Tensor, kv: Tensor, compressed: Tensor, sink: Tensor, selected: Tensor,
    window: int, ratio: int, scale: float, coeff: float, sparse: bool, offset: int = 0, heads_of: Group = ALONE.tensor,
):
    """scores [b, s, g], then what sparse_attention takes -> loss [1]. Only the scores get a gradient.

    ``heads_of``: the ranks that have a part of the attention's heads each, as query and sink do.

    loss = coeff / (b s) sum over queries of KL(teacher || softmax of the scores), both over the selected entries
    (``sparse``) or over all complete ones. Queries without an entry count in b s.
    """
    b, s, groups = scores.shape
    target = _teacher(query, kv, compressed, sink, selected, window, ratio, scale, sparse, offset, heads_of)
    if sparse:
        index = selected.clip(min=0).astype("int64")
        student = paddle.masked_fill(paddle.take_along_axis(scores, index, 2), selected < 0, 0.0)
        mask = (selected < 0).astype(scores.dtype) * NEVER
    else:
        student, mask = scores, selection_mask(None, s, groups, ratio, offset, dtype_name(scores))
    target = target * (mask == 0).astype(target.dtype)
    kl, probability = _divergence(student, target, mask)

    def backward(dloss):
        g = (probability - target) * (dloss * (coeff / (b * s)))
        if sparse:  # padding repeats index 0 with a gradient of zero, hence add
            g = paddle.put_along_axis(paddle.zeros_like(scores), index, g, 2, reduce="add")
        return (g, *[None] * 5)

    return (kl.sum() * (coeff / (b * s))).reshape([1]), backward


@indexer_loss.variant("plain", "dense masks over all entries, differentiated by autograd")
def plain_indexer_loss(
    scores: Tensor, query: Tensor, kv: Tensor, compressed: Tensor, sink: Tensor, selected: Tensor,
    window: int, ratio: int, scale: float, coeff: float, sparse: bool, offset: int = 0, heads_of: Group = ALONE.tensor,
) -> Tensor:
    b, s, groups = scores.shape
    with paddle.no_grad():
        mask = selection_mask(selected if sparse else None, s, groups, ratio, offset, dtype_name(scores))
        padded = whole_windows(s, window)
        segments = make_segments(kv, compressed, None, s, window, ratio, offset)
        q = batch_first(query, padded) * scale
        near = segments[0].scores(q)[:, :s]
        far = segments[1].cut(0, s).products(q[:, :s]) + mask.unsqueeze(2)
        rest = widen(sink).reshape([1, 1, -1, 1]).expand([b, s, q.shape[2], 1])
        p = F.softmax(paddle.concat([near, rest, far], -1), -1)[..., -groups:].sum(2)
        p = p * (mask == 0).astype(p.dtype)  # Paddle's CPU softmax gives masked entries exp(-64), not zero
        p = heads_of.all_reduce_(p)
        target = p / p.sum(-1, keepdim=True).clip(min=1.1754944e-38)
    return (_divergence(scores, target, mask)[0].sum() * (coeff / (b * s))).reshape([1])
