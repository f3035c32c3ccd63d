"""Bias-free linear layers: y = x W^T with W stored [out, in], and its grouped form."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

linear = define("linear", "x W^T, one GEMM over all leading dimensions", spec="0")
grouped_linear = define("grouped_linear", "block-diagonal linear: group g of x times block g of W", spec="5.6")


@linear.variant("paddle", "paddle.matmul on folded rows")
def paddle_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    rows = paddle.matmul(x.reshape([-1, x.shape[-1]]), weight, transpose_y=True)
    return rows.reshape([*x.shape[:-1], weight.shape[0]])


@grouped_linear.variant("paddle", "one batched matmul over the groups")
def paddle_grouped_linear(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """x [s, b, groups*d], weight [groups*r, d] -> [s, b, groups*r]."""
    s, b, width = x.shape
    by_group = x.reshape([s * b, groups, width // groups]).transpose([1, 0, 2])
    out = paddle.matmul(by_group, weight.reshape([groups, -1, width // groups]), transpose_y=True)
    return out.transpose([1, 0, 2]).reshape([s, b, weight.shape[0]])


@megatron_order(linear, "dx = dy W on the N-D dy; dW = dy^T x on folded rows, in the parameter dtype", explicit=True)
def megatron_linear(K, x, weight):
    def backward(dy):
        rows_dy, rows_x = dy.reshape([-1, dy.shape[-1]]), x.reshape([-1, x.shape[-1]])
        return K.matmul(dy, weight), K.matmul(K.permute(rows_dy, 1, 0), rows_x)

    return K.matmul(x, K.permute(weight, 1, 0)), backward


@megatron_order(grouped_linear, "einsum ...gd,grd->...gr")
def megatron_grouped_linear(K, x, weight, groups):
    s, b, width = x.shape
    blocks = weight.reshape([groups, -1, width // groups])
    out = K.grouped_matmul(x.reshape([s, b, groups, width // groups]), blocks)
    return out.reshape([s, b, -1])
