"""Sparse attention as one kernel forward, one backward and an inverted index for the keys' gradients."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import refusal, refuse
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.sparse_attention import sparse_attention


@sparse_attention.variant("fused", "Triton, tiles of gathered keys, float32 inside; no atomics", needs="triton",
                          refuses=refusal)
@differentiable
def fused_sparse_attention(
    query: Tensor, kv: Tensor, compressed: Tensor | None, selected: Tensor | None, sink: Tensor,
    window: int, ratio: int, scale: float, offset: int = 0,
):
    """query [s, b, H, D], kv [n, b, D], compressed [g, b, D] or None, selected [b, s, K] (-1: none, no entry twice) or
    None for every complete entry, sink [H] -> [s, b, H*D] in the dtype of query. UserError beyond a head dim of 512."""
    from paddledsv4.kernels import sparse_attention as kernel

    refuse("sparse_attention", kernel.limits(CARRIER, query))
    tensors = [x if x is None else x.contiguous() for x in (query, kv, compressed, selected, bounded(sink))]
    static = {"window": window, "ratio": ratio, "scale": scale, "offset": offset}
    out, lse = kernel.forward(CARRIER, *tensors, **static)

    def backward(dy):
        dout = dy.reshape(query.shape).contiguous()
        dquery, dkv, dcompressed, dsink = kernel.backward(CARRIER, dout, out, lse, *tensors, **static)
        between = () if compressed is None else (dcompressed,)
        return dquery, dkv, *between, *(() if selected is None else (None,)), dsink

    return out.reshape([*query.shape[:2], -1]), backward


def bounded(sink: Tensor) -> Tensor:
    """The sink, but at most 1e37 in size, as the kernels count in powers of two: 3e38 log2(e) is no float32 number, and
    -inf would be its own maximum where a query has no key. No weight changes; +inf and NaN stay, to be seen."""
    shown = paddle.isnan(sink) | (sink == math.inf)
    return paddle.where(shown, sink, paddle.clip(sink, -1e37, 1e37))
