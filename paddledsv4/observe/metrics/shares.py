"""Where the weight of sparse attention goes, computed anew from its inputs for a sample of the queries.

Of a query: the share of its softmax that the sink takes, and what the indexer's choice missed of the weight that dense
attention, over all complete compressed entries, would have given to its best ones.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.ops.attention_segments import NEVER
from paddledsv4.ops.precision import widen

SAMPLE = 64  # queries looked at in each call; the README says what that costs


def sampled_rows(queries: int, at_most: int = SAMPLE) -> np.ndarray:
    """The queries looked at, ascending: all of them if there are few, else the same at every step."""
    return np.sort(np.random.default_rng(0).choice(queries, min(queries, at_most), replace=False))


@paddle.no_grad()
def attention_weights(
    query: Tensor, kv: Tensor, compressed: Tensor | None, selected: Tensor | None, sink: Tensor,
    window: int, ratio: int, scale: float, offset: int, rows: np.ndarray,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Arguments as ``sparse_attention`` takes them, and Q of its queries ``rows``.

    Returns:
        the sink's weight [Q, b, H]; with ``selected`` also the weights [Q, b, g] of all complete compressed entries
        under dense attention, summed over heads, and which of them were chosen, 1 or 0.
    """
    here = paddle.to_tensor(rows)
    q = widen(paddle.gather(query, here)) * scale
    place = (here + (kv.shape[0] - query.shape[0])).unsqueeze(1) - paddle.arange(window)
    near = paddle.gather(widen(kv), place.clip(min=0).flatten()).reshape([len(rows), window, *kv.shape[1:]])
    scores = paddle.matmul(q, near.transpose([0, 2, 3, 1]))
    scores = scores + ((place < 0).astype(q.dtype) * NEVER).reshape([len(rows), 1, 1, window])
    logit = widen(sink).reshape([1, 1, -1, 1])
    if compressed is None:
        return _sink_share(logit, scores), None, None
    groups = compressed.shape[0]
    far = paddle.matmul(q.transpose([1, 0, 2, 3]).flatten(1, 2), widen(compressed).transpose([1, 2, 0]))
    far = far.reshape([q.shape[1], len(rows), -1, groups]).transpose([1, 0, 2, 3])
    complete = (paddle.arange(groups) < ((here + offset + 1) // ratio).unsqueeze(1)).astype(q.dtype).unsqueeze(1)
    if selected is None:
        return _sink_share(logit, scores, far + _hidden(complete)), None, None
    chosen = paddle.gather(selected.transpose([1, 0, 2]), here)  # [Q, b, K]
    chosen = F.one_hot(chosen.astype("int64") + 1, groups + 1).sum(2)[..., 1:].astype(q.dtype)
    dense = F.softmax(paddle.concat([far + _hidden(complete), scores, logit.expand([*far.shape[:3], 1])], -1), -1)
    return _sink_share(logit, scores, far + _hidden(chosen)), dense[..., :groups].sum(2) * complete, chosen


def _hidden(visible: Tensor) -> Tensor:
    """[Q, b or 1, g] of 1 and 0 -> what is added to scores [Q, b, H, g]."""
    return ((1.0 - visible) * NEVER).unsqueeze(2)


def _sink_share(logit: Tensor, *scores: Tensor) -> Tensor:
    logits = paddle.concat([logit.expand([*scores[0].shape[:3], 1]), *scores], -1)
    return paddle.exp(logit.squeeze(-1) - paddle.logsumexp(logits, -1))


@paddle.no_grad()
def recall(mass: Tensor, chosen: Tensor, rows: np.ndarray, ratio: int, offset: int, topk: int) -> np.ndarray:
    """mass, chosen [Q, b, g] -> [3], sums over the queries with more complete entries than ``topk``; the others have no
    choice. Of each the share of its ``topk`` best entries by mass that were chosen, the mass of the chosen over that of
    the best, and 1."""
    has_choice = np.flatnonzero((rows + offset + 1) // ratio > topk)
    if not has_choice.size:
        return np.zeros(3)
    mass, chosen = (paddle.gather(x, paddle.to_tensor(has_choice)).flatten(0, 1) for x in (mass, chosen))
    weight, best = paddle.topk(mass, topk, -1)
    found = paddle.take_along_axis(chosen, best, -1).mean(-1)
    share = (mass * chosen).sum(-1) / weight.sum(-1).clip(min=1.1754944e-38)
    return np.array([float(found.sum()), float(share.sum()), mass.shape[0]])
