"""Attention of every query over a sliding window and compressed entries, with one shared key-value head and a sink.

out = sum_k p_k kv_k, p = exp(score) / (sum exp(score) + exp(sink)): the sink takes weight and gives no value.

Scores and sink are shifted by their common maximum, so that no exponential overflows. A query without any key gives
exactly zero and finite gradients, whatever its sink: the maximum is at least LOWEST_TOP, far above a masked score, and
the denominator at least DENOMINATOR; that of every other query is 1 or more.
"""

from __future__ import annotations

import functools

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.attention_segments import NEVER, Compressed, Selected, Window, causal_mask
from paddledsv4.ops.precision import at_least, dtype_name, widen
from paddledsv4.ops.reduce import row_sum

sparse_attention = define("sparse_attention", "window and selected compressed entries under one softmax with sink",
                          spec="8.4")

LOWEST_TOP, DENOMINATOR = NEVER / 2, 0.5
CHUNK_NUMBERS = 1 << 24  # at most about this many scores or gathered numbers are alive at a time


def batch_first(x: Tensor, rows: int | None = None) -> Tensor:
    """[s, b, ...] -> [b, rows, ...], zeros behind row s."""
    x = widen(x)
    if rows is not None and rows > x.shape[0]:
        x = paddle.concat([x, paddle.zeros([rows - x.shape[0], *x.shape[1:]], x.dtype)], 0)
    return x.transpose([1, 0, *range(2, x.ndim)])


def whole_windows(rows: int, window: int) -> int:
    """``rows``, rounded up to a multiple of the window; as they are without one."""
    return -(-rows // window) * window if window else rows


def near_keys(kv: Tensor, queries: int, window: int) -> tuple[Tensor, int]:
    """kv [n, b, D], whose last rows are those of the queries -> [b, window + rows, D] in float32 or wider: ``window``
    keys before the first query, then those of the queries, padded to whole windows. Zeros where there is no key; of
    those before the first query, the second result is the number."""
    first = kv.shape[0] - queries - window
    missing = max(-first, 0)
    inside = batch_first(kv[max(first, 0) :], window + whole_windows(queries, window) - missing)
    before = paddle.zeros([inside.shape[0], missing, inside.shape[2]], inside.dtype)
    return (paddle.concat([before, inside], 1) if missing else inside), missing


def near_keys_backward(dkeys: Tensor, kv: Tensor, queries: int, window: int) -> Tensor:
    """The gradient of ``near_keys``: dkeys [b, window + rows, D] -> [n, b, D]."""
    first = kv.shape[0] - queries - window
    inside = dkeys[:, max(-first, 0) : window + queries].transpose([1, 0, 2]).astype(kv.dtype)
    return paddle.concat([paddle.zeros_like(kv[:first]), inside], 0) if first > 0 else inside


def make_segments(
    kv: Tensor, compressed: Tensor | None, selected: Tensor | None, queries: int, window: int, ratio: int, offset: int
) -> list:
    """The segments of kv [n, b, D], compressed [g, b, D] or None, selected [b, s, K] or None for all complete ones,
    for s queries from position ``offset`` on, the last n keys. Rows are padded to a multiple of the window."""
    rows, segments = whole_windows(queries, window), []
    if window:
        keys, missing = near_keys(kv, queries, window)
        segments.append(Window(keys, window, missing))
    if compressed is not None and selected is None:
        segments.append(Compressed(batch_first(compressed), ratio, offset))
    elif compressed is not None:
        pad = rows - selected.shape[1]
        index = F.pad(selected, [0, 0, 0, pad, 0, 0], value=-1, pad_from_left_axis=True) if pad else selected
        segments.append(Selected(batch_first(compressed), index))
    return segments


def row_chunks(rows: int, window: int, numbers_per_row: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into ranges of whole windows whose temporaries stay under the limit."""
    whole = max(window, 1)
    step = max(CHUNK_NUMBERS // (numbers_per_row * whole), 1) * whole
    return [(r, min(r + step, rows)) for r in range(0, rows, step)]


def _join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else paddle.concat(chunks, 1)


@sparse_attention.variant("paddle", "banded window, chunks of rows; backward recomputes weights if chunked")
@differentiable
def paddle_sparse_attention(
    query: Tensor, kv: Tensor, compressed: Tensor | None, selected: Tensor | None, sink: Tensor,
    window: int, ratio: int, scale: float, offset: int = 0,
):
    """query [s, b, H, D], kv [n, b, D], compressed [g, b, D] or None, selected [b, s, K] integers (-1: none) or None
    for every complete entry, sink [H] -> [s, b, H*D] in the dtype of query.

    ``window`` counts the query's own position; 0: compressed entries only, of which a query may have none.
    The queries are those of positions ``offset`` to ``offset + s``. The keys end with the last query and begin with
    the first of its window, or anywhere before.
    """
    s, b, heads, d = query.shape
    padded = whole_windows(s, window)
    segments = make_segments(kv, compressed, selected, s, window, ratio, offset)
    q = batch_first(query, padded) * scale
    sink_logit = widen(sink).reshape([1, 1, heads, 1])
    chunks = row_chunks(padded, window, b * sum(segment.numbers_per_row(heads) for segment in segments))

    outs, lses, kept = [], [], []
    for r0, r1 in chunks:
        parts = [segment.cut(r0, r1) for segment in segments]
        scores = [part.scores(q[:, r0:r1]) for part in parts]
        best = functools.reduce(paddle.maximum, [x.max(-1, keepdim=True) for x in scores])
        top = at_least(paddle.maximum(best, sink_logit.expand(best.shape)), LOWEST_TOP)
        weights = [(x - top.expand(x.shape)).exp_() for x in scores]
        total = paddle.exp(sink_logit.expand(top.shape) - top)
        for x in weights:
            total = total + row_sum(x)
        total = at_least(total, DENOMINATOR)
        # Paddle's exp of a masked score is 3e-39 on a CPU, which only queries without keys would show
        inverse = (best > LOWEST_TOP).astype(total.dtype) / total
        values = paddle.add_n([part.weigh(x) for part, x in zip(parts, weights, strict=True)])
        outs.append(values * inverse.expand(values.shape))
        lses.append(top + paddle.log(total))
        if len(chunks) == 1:  # small enough to be kept for backward
            kept = [x * inverse.expand(x.shape) for x in weights]
    out, lse = _join(outs), _join(lses)

    def probabilities(part, rows, row_lse):
        x = part.scores(rows)
        return (x - row_lse.expand(x.shape)).exp_()

    def backward(dy):
        dout = batch_first(dy.reshape([s, b, heads, d]), padded)
        delta = row_sum(dout * out)
        dsink = -(paddle.exp(sink_logit - lse) * delta).sum([0, 1, 3])
        for segment in segments:
            segment.begin_gradient()
        dqs = []
        for r0, r1 in chunks:
            rows = slice(r0, r1)
            dq = []
            for i, segment in enumerate(segments):
                part = segment.cut(r0, r1)
                p = kept[i] if kept else probabilities(part, q[:, rows], lse[:, rows])
                # where the mask forbids a key p is zero, so the gradient needs no mask
                dp = part.products(dout[:, rows])
                ds = dp.subtract_(delta[:, rows].expand(dp.shape)).multiply_(p)
                dq.append(part.gradient(p, ds, q[:, rows], dout[:, rows]))
            dqs.append(paddle.add_n(dq))
        dquery = (_join(dqs)[:, :s] * scale).transpose([1, 0, 2, 3]).astype(query.dtype)
        near, far = segments[: bool(window)], segments[bool(window) :]
        dkv = near_keys_backward(near[0].dkeys, kv, s, window) if near else paddle.zeros_like(kv)
        dcompressed = tuple(segment.dkeys.transpose([1, 0, 2]).astype(compressed.dtype) for segment in far)
        dselected = (None,) if selected is not None else ()
        return dquery, dkv, *dcompressed, *dselected, dsink.astype(sink.dtype)

    result = out[:, :s].transpose([1, 0, 2, 3]).reshape([s, b, heads * d]).astype(query.dtype)
    return result, backward


def selection_mask(selected: Tensor | None, rows: int, groups: int, ratio: int, offset: int, dtype: str) -> Tensor:
    """[b or 1, rows, groups] additive: 0 where a query sees a compressed entry, NEVER elsewhere."""
    if selected is None:
        return causal_mask(offset, offset + rows, groups, ratio, dtype).unsqueeze(0)
    chosen = F.one_hot(selected + 1, groups + 1).sum(2)[:, :, 1:].astype(dtype)
    return (1.0 - chosen) * NEVER


@sparse_attention.variant("plain", "dense scores over all positions with a mask, differentiated by autograd")
def plain_sparse_attention(
    query: Tensor, kv: Tensor, compressed: Tensor | None, selected: Tensor | None, sink: Tensor,
    window: int, ratio: int, scale: float, offset: int = 0,
) -> Tensor:
    s, b, heads, d = query.shape
    q, keys = batch_first(query), batch_first(kv)
    dtype = dtype_name(q)
    length = kv.shape[0]
    distance = paddle.arange(length - s, length).unsqueeze(1) - paddle.arange(length).unsqueeze(0)
    mask = ((distance < 0) | (distance >= window)).astype(dtype).unsqueeze(0) * NEVER
    if compressed is not None:
        entries = batch_first(compressed)
        far = selection_mask(selected, s, entries.shape[1], ratio, offset, dtype)
        mask = paddle.concat([mask.expand([far.shape[0], -1, -1]), far], -1)
        keys = paddle.concat([keys, entries], 1)
    visible = mask == 0
    keys = paddle.where(visible.any(1).unsqueeze(-1), keys, paddle.zeros_like(keys))  # what nobody sees is not read
    scores = paddle.einsum("bshd,btd->bsht", q, keys) * scale + mask.unsqueeze(2)
    with_sink = paddle.concat([scores, widen(sink).reshape([1, 1, heads, 1]).expand([b, s, heads, 1])], -1)
    p = F.softmax(with_sink, -1)[..., :-1]
    p = p * visible.astype(dtype).unsqueeze(2)  # Paddle's CPU softmax gives masked keys exp(-64), not zero
    out = paddle.einsum("bsht,btd->bshd", p, keys)
    return out.transpose([1, 0, 2, 3]).reshape([s, b, heads * d]).astype(query.dtype)


def index_list(K, s, batch, window, ratio, groups, selected, offset, length, like):
    """[b, s, T] int64: rows of the window's keys, ascending, then compressed entries from row ``length`` on; -1: none.

    The queries begin at position ``offset`` and are the last s of ``length`` keys.

    The order of this list is the order of summation in the reference's attention (spec 8.1).
    """
    row = K.arange(length - s, length, dtype="int64", like=like).unsqueeze(1)
    lists = []
    if window:
        near = K.clamp(row - window + 1, 0, None) + K.arange(window, dtype="int64", like=like).unsqueeze(0)
        near = K.where(near > row, K.full([1], -1, "int64", like=like), near)
        lists.append(near.unsqueeze(0).expand([batch, s, window]))
    if groups and selected is None:
        entry = K.arange(groups, dtype="int64", like=like).unsqueeze(0)
        complete = (row + (offset + s - length + 1)) // ratio
        far = K.where(entry >= complete, K.full([1], -1, "int64", like=like), entry + length)
        lists.append(far.unsqueeze(0).expand([batch, s, groups]))
    elif groups:
        entry = K.cast(selected, "int64")
        lists.append(K.where(entry < 0, K.full([1], -1, "int64", like=like), entry + length))
    return K.cat(lists, -1)


@megatron_order(sparse_attention, "gathered keys in list order, shift by max(row maximum, sink), e / (sum e + e_sink)")
def megatron_sparse_attention(K, query, kv, compressed, selected, sink, window, ratio, scale, offset=0):
    s, b, heads, d = query.shape
    groups = 0 if compressed is None else compressed.shape[0]
    keys = kv if compressed is None else K.cat([kv, compressed], 0)
    total = kv.shape[0] + groups
    index = index_list(K, s, b, window, ratio, groups, selected, offset, kv.shape[0], like=query)
    base = K.arange(b, dtype="int64", like=query).reshape([b, 1, 1]) * total
    index = K.where(index >= 0, index + base, index).reshape([b * s, -1])
    q = K.wide(K.permute(query, 1, 0, 2, 3).reshape([b * s, heads, d]))
    gathered = K.wide(K.shared_rows(K.permute(keys, 1, 0, 2).reshape([b * total, d]), index))
    scores = K.einsum("inh,ikh->ink", q, gathered) * scale
    scores = K.masked_fill(scores, (index < 0).unsqueeze(1), float("-inf"))
    sink = K.wide(sink).reshape([1, heads, 1])
    top = K.clamp(K.maximum(K.max(scores, -1, keepdim=True), sink), LOWEST_TOP, None)
    e, e_sink = K.exp(scores - top), K.exp(sink - top)
    weight = e / K.clamp(K.sum(e, -1, keepdim=True) + e_sink, DENOMINATOR, None)
    out = K.cast(K.einsum("ink,ikh->inh", weight, gathered), K.dtype(query))
    return K.contiguous(K.permute(out.reshape([b, s, heads * d]), 1, 0, 2))
