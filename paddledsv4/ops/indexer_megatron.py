"""The indexer in Megatron's order: dense scores and masks over all compressed entries (spec 8.2, 8.3)."""

from __future__ import annotations

from paddledsv4.distributed.group import ALONE
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.ops.indexer import indexer_loss, indexer_score, indexer_topk, indexer_weights
from paddledsv4.ops.sparse_attention import index_list

WINDOW_CHUNK = 512  # rows of the window's log mass that the reference takes at a time
TINY, LOG_FLOOR, SOFTMAX_FLOOR = 1.1754943508222875e-38, 1e-10, 1e-10


def complete(K, s, groups, ratio, offset, like):
    """[s, groups] bool: entry c is complete at position i, c < (i+1) // ratio; row 0 is position ``offset``."""
    row = K.arange(offset + 1, offset + s + 1, dtype="int64", like=like).unsqueeze(1)
    return K.arange(groups, dtype="int64", like=like).unsqueeze(0) < row // ratio


@megatron_order(indexer_weights, "product in the dtype of the activations",
                same_bits="one product")
def megatron_indexer_weights(K, weights, heads):
    return weights * heads**-0.5


@megatron_order(indexer_score, "einsum sbhd,tbd->sbht in float32, relu, weighted, summed over heads", explicit=True)
def megatron_indexer_score(K, query, key, weights):
    q, k, d_scale = K.wide(query), K.wide(key), query.shape[-1] ** -0.5
    w = K.wide(weights) * d_scale
    scores = K.sum(K.relu(K.einsum("sbhd,tbd->sbht", q, k)) * w.unsqueeze(-1), 2)

    def backward(dscores):
        g = K.permute(dscores, 1, 0, 2).unsqueeze(2)
        raw = K.einsum("sbhd,tbd->sbht", q, k)
        dw = K.sum(g * K.relu(raw), -1) * d_scale
        draw = (g * w.unsqueeze(-1)) * K.cast(raw > 0, K.dtype(raw))
        dq, dk = K.einsum("sbht,tbd->sbhd", draw, k), K.einsum("sbht,sbhd->tbd", draw, q)
        return K.cast(dq, K.dtype(query)), K.cast(dk, K.dtype(key)), K.cast(dw, K.dtype(weights))

    return K.permute(scores, 1, 0, 2), backward


@megatron_order(indexer_topk, "top-k of masked scores, best first; ties as the kernel leaves them", explicit=True,
                same_bits="the same choice unless scores tie")
def megatron_indexer_topk(K, scores, topk, ratio, offset=0):
    _, s, groups = scores.shape
    visible = complete(K, s, groups, ratio, offset, like=scores).unsqueeze(0)
    index = K.topk(K.masked_fill(scores, K.logical_not(visible), float("-inf")), min(topk, groups))[1]
    entries = (K.arange(offset + 1, offset + s + 1, dtype="int64", like=scores) // ratio).reshape([1, s, 1])
    index = K.where(index < entries, index, K.full([1], -1, "int64", like=scores))
    return K.cast(index, "int32"), lambda *_: (None,)


def window_log_mass(K, query, kv, sink, window, scale, offset):
    """[b, H, s]: log of the attention mass outside the compressed entries: the window's and the sink's."""
    s, b, heads, d = query.shape
    length = kv.shape[0]
    index = index_list(K, s, b, window, 0, 0, None, offset, length, like=query)
    index = K.where(index >= 0, index + K.arange(b, dtype="int64", like=query).reshape([b, 1, 1]) * length, index)
    index = index.reshape([b * s, window])
    q = K.wide(K.permute(query, 1, 0, 2, 3).reshape([b * s, heads, d]))
    keys = K.wide(K.permute(kv, 1, 0, 2).reshape([b * length, d]))
    sink = K.wide(sink).reshape([1, heads])
    parts = []
    for start in range(0, b * s, WINDOW_CHUNK):
        rows = index[start : start + WINDOW_CHUNK]
        near = K.index_select(keys, K.clamp(rows, 0, None).reshape([-1])).reshape([rows.shape[0], window, d])
        logits = K.einsum("rhd,rkd->rhk", q[start : start + WINDOW_CHUNK], near) * scale
        logits = K.masked_fill(logits, (rows < 0).unsqueeze(1), float("-inf"))
        parts.append(K.logaddexp(K.logsumexp(logits, -1), sink))
    return K.contiguous(K.permute(K.cat(parts, 0).reshape([b, s, heads]), 0, 2, 1))


def teacher(K, query, kv, compressed, sink, visible, window, scale, offset, heads_of):
    """[b, s, g]: the attention's own weights of the visible entries, summed over heads, normalised per query."""
    s, b, heads, d = query.shape
    groups = compressed.shape[0]
    q = K.wide(K.permute(query, 1, 2, 0, 3).reshape([b * heads, s, d]))
    keys = compressed.unsqueeze(2).expand([groups, b, heads, d])
    keys = K.wide(K.permute(keys, 1, 2, 3, 0).reshape([b * heads, d, groups]))
    scores = (K.bmm(q, keys) * scale).reshape([b, heads, s, groups])
    hidden = K.logical_not(visible).unsqueeze(1).expand([b, heads, s, groups])
    scores = K.masked_fill(scores, hidden, float("-inf"))
    mass = K.logaddexp(window_log_mass(K, query, kv, sink, window, scale, offset), K.logsumexp(scores, -1))
    p = K.masked_fill(K.exp(scores - mass.unsqueeze(-1)), hidden, 0.0)
    target = K.all_reduce(K.sum(p, 1), heads_of)
    return target / K.clamp(K.sum(target, -1, keepdim=True), TINY, None)


def student(K, scores, visible):
    """Softmax over the visible entries [b, s, g] and its logarithm; rows without any are zero."""
    hidden = K.logical_not(visible)
    masked = K.masked_fill(scores, hidden, K.lowest(scores))
    some = K.cast(K.sum(K.cast(visible, "int64"), -1, keepdim=True) > 0, "bool")
    top = K.max(masked, -1, keepdim=True)
    top = K.where(some, top, top * 0.0)
    e = K.masked_fill(K.exp(masked - top), hidden, 0.0)
    p = e / K.clamp(K.sum(e, -1, keepdim=True), SOFTMAX_FLOOR, None)
    log_p = K.log_softmax(K.where(some.expand(masked.shape), masked, masked * 0.0), -1)
    return K.masked_fill(p, hidden, 0.0), K.masked_fill(log_p, hidden, 0.0)


@megatron_order(indexer_loss, "dense masks; gradient (student - target) c on visible entries", explicit=True)
def megatron_indexer_loss(
    K, scores, query, kv, compressed, sink, selected, window, ratio, scale, coeff, sparse, offset=0,
    heads_of=ALONE.tensor,
):
    b, s, groups = scores.shape
    visible = complete(K, s, groups, ratio, offset, like=scores).unsqueeze(0).expand([b, s, groups])
    if sparse:
        chosen = K.sum(K.one_hot(K.cast(selected, "int64") + 1, groups + 1), 2)[:, :, 1:]
        visible = K.logical_and(visible, chosen > 0)
    target = teacher(K, query, kv, compressed, sink, visible, window, scale, offset, heads_of)
    p, log_p = student(K, scores, visible)
    kl = K.sum(target * (K.log(K.clamp(target, LOG_FLOOR, None)) - log_p), -1)

    def backward(dloss):
        g = (p - target) * (dloss * coeff / float(b * s)).reshape([1, 1, 1])
        return (g * K.cast(visible, K.dtype(g)), *[None] * 5)

    return (K.sum(kl) / float(b * s) * coeff).reshape([1]), backward
