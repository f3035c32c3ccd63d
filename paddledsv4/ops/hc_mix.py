"""What the gates of a hyper-connection do to the residual streams: expand, aggregate, mix, contract."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen
from paddledsv4.ops.reduce import row_mean

hc_expand = define("hc_expand", "copies of the embedding as the first streams", spec="2")
hc_aggregate = define("hc_aggregate", "h_pre-weighted sum of the streams: a layer's input", spec="4.3")
hc_mix = define("hc_mix", "H_res^T applied to the streams plus h_post times a layer's output", spec="4.4")
hc_contract = define("hc_contract", "gated sum of the streams at the end of the network; the streams pass through",
                     spec="4.5", outputs=("out", "streams"))


@hc_expand.variant("paddle", "tile", same_bits="copies; their gradients add one after another")
def paddle_hc_expand(x: Tensor, streams: int) -> Tensor:
    """x [s, b, C] -> [s, b, n*C]."""
    return paddle.tile(x, [1, 1, streams])


@hc_aggregate.variant("paddle", "batched [1, n] x [n, C] products")
def paddle_hc_aggregate(streams: Tensor, h_pre: Tensor) -> Tensor:
    """streams [s, b, n*C], h_pre [s, b, n] -> [s, b, C]."""
    s, b, n = h_pre.shape
    x = streams.reshape([s * b, n, -1])
    return paddle.matmul(h_pre.reshape([s * b, 1, n]), x).reshape([s, b, -1])


@hc_mix.variant("paddle", "one batched [n, n+1] x [n+1, C] product: the layer's output as one more stream")
def paddle_hc_mix(h_res: Tensor, streams: Tensor, h_post: Tensor, output: Tensor) -> Tensor:
    """h_res [s, b, n, n], streams [s, b, n*C], h_post [s, b, n], output [s, b, C] -> [s, b, n*C].

    New stream j = h_post[j] * output + sum_i h_res[i, j] * stream i.
    """
    s, b, n = h_post.shape
    rows = s * b
    x = paddle.concat([streams.reshape([rows, n, -1]), output.reshape([rows, 1, -1])], 1)
    gates = paddle.concat([h_res.reshape([rows, n, n]), h_post.reshape([rows, 1, n])], 1)
    return paddle.matmul(gates, x, transpose_x=True).reshape(streams.shape)


@hc_contract.variant("paddle", "rsqrt with eps inside the root, batched [1, n] x [n, C] products")
def paddle_hc_contract(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float):
    """streams [s, b, n*C], fn [n, n*C], base [n], scale [1] -> hidden [s, b, C] and the streams for whoever goes on.

    eps stands in the root and on the gate. The streams pass through so that their gradients are added here.
    """
    s, b, width = streams.shape
    n = fn.shape[0]
    x = widen(streams).reshape([s * b, width])
    q = paddle.rsqrt(row_mean(x * x) + eps)
    gate = F.sigmoid(paddle.matmul(x, fn, transpose_y=True) * q * scale + base) + eps
    y = paddle.matmul(gate.reshape([s * b, 1, n]), x.reshape([s * b, n, width // n]))
    return y.reshape([s, b, width // n]).astype(streams.dtype), streams


@megatron_order(hc_expand, "expand and copy; gradients of the copies are summed",
                same_bits="copies; their gradients add one after another")
def megatron_hc_expand(K, x, streams):
    s, b, width = x.shape
    return K.contiguous(x.unsqueeze(2).expand([s, b, streams, width])).reshape([s, b, streams * width])


@megatron_order(hc_aggregate, "product in the dtype of the streams, then the sum over streams",
                same_bits="Paddle's kernels add in torch's order")
def megatron_hc_aggregate(K, streams, h_pre):
    s, b, n = h_pre.shape
    return K.sum(K.scale_rows(streams.reshape([s, b, n, -1]), h_pre.unsqueeze(-1)), 2)


@megatron_order(hc_mix, "h_post o + bmm(H_res^T, X), the post term first")
def megatron_hc_mix(K, h_res, streams, h_post, output):
    s, b, n = h_post.shape
    mixed = K.bmm(K.permute(h_res.reshape([s * b, n, n]), 0, 2, 1), streams.reshape([s * b, n, -1]))
    every = output.unsqueeze(2).expand([s, b, n, output.shape[-1]])
    out = K.scale_rows(every, h_post.unsqueeze(-1)) + mixed.reshape([s, b, n, -1])
    return out.reshape(streams.shape)


@megatron_order(hc_contract, "((through + product) + linear) + square: the gradients' order, MTP's first")
def megatron_hc_contract(K, streams, fn, base, scale, eps):
    s, b, width = streams.shape
    x = K.wide(streams)
    q = K.rsqrt(K.mean(K.square(x), -1, keepdim=True) + eps)
    mixes = K.matmul(x, K.permute(fn, 1, 0)) * q
    gate = K.sigmoid(mixes * scale + base) + eps
    y = K.sum(K.scale_rows(x.reshape([s, b, fn.shape[0], -1]), gate.unsqueeze(-1)), -2)
    return K.cast(y, K.dtype(streams)), K.view(streams)  # made last, so that its gradient is added first
