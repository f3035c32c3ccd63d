"""What the gates of a hyper-connection do to the residual streams: expand, aggregate, mix, contract."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_mean

hc_expand = define("hc_expand", "copies of the embedding as the first streams", spec="2")
hc_aggregate = define("hc_aggregate", "h_pre-weighted sum of the streams: a layer's input", spec="4.3")
hc_mix = define("hc_mix", "H_res^T applied to the streams plus h_post times a layer's output", spec="4.4")
hc_contract = define("hc_contract", "gated sum of the streams at the end of the network", spec="4.5")


@hc_expand.variant("paddle", "tile")
def paddle_hc_expand(x: Tensor, streams: int) -> Tensor:
    """x [s, b, C] -> [s, b, n*C]."""
    return paddle.tile(x, [1, 1, streams])


@hc_aggregate.variant("paddle", "batched [1, n] x [n, C] products")
def paddle_hc_aggregate(streams: Tensor, h_pre: Tensor) -> Tensor:
    """streams [s, b, n*C], h_pre [s, b, n] -> [s, b, C]."""
    s, b, n = h_pre.shape
    x = streams.reshape([s * b, n, -1])
    return paddle.matmul(h_pre.astype(x.dtype).reshape([s * b, 1, n]), x).reshape([s, b, -1])


@hc_mix.variant("paddle", "one batched [n, n+1] x [n+1, C] product: the layer's output as one more stream")
def paddle_hc_mix(h_res: Tensor, streams: Tensor, h_post: Tensor, output: Tensor) -> Tensor:
    """h_res [s, b, n, n], streams [s, b, n*C], h_post [s, b, n], output [s, b, C] -> [s, b, n*C].

    New stream j = h_post[j] * output + sum_i h_res[i, j] * stream i.
    """
    s, b, n = h_post.shape
    rows = s * b
    x = paddle.concat([streams.reshape([rows, n, -1]), output.reshape([rows, 1, -1])], 1)
    gates = paddle.concat([h_res.reshape([rows, n, n]), h_post.reshape([rows, 1, n])], 1).astype(x.dtype)
    return paddle.matmul(gates, x, transpose_x=True).reshape(streams.shape)


@hc_contract.variant("paddle", "rsqrt with eps inside the root, batched [1, n] x [n, C] products")
def paddle_hc_contract(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float) -> Tensor:
    """streams [s, b, n*C], fn [n, n*C], base [n], scale [1] -> [s, b, C]. eps stands in the root and on the gate."""
    s, b, width = streams.shape
    n = fn.shape[0]
    x = widen(streams).reshape([s * b, width])
    q = paddle.rsqrt(row_mean(x * x) + eps)
    gate = F.sigmoid(paddle.matmul(x, fn, transpose_y=True) * q * scale + base) + eps
    y = paddle.matmul(gate.reshape([s * b, 1, n]), x.reshape([s * b, n, width // n]))
    return y.reshape([s, b, width // n]).astype(streams.dtype)
