"""A linear layer on a frozen MXFP4 weight that exists in full only while it is multiplied with.

It follows the switch ``linear``: forward is the function chosen there, on the unpacked weight, and the gradient of x is
computed as that function's backward does, so every bit is that of the unpacked weight. What is kept for backward are
the packed weight and its scales: not x, since the weight gets no gradient, and not the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import follower
from paddledsv4.ops.precision import dtype_name
from paddledsv4.weights import mxfp4
from paddledsv4.weights.fp8 import E8M0

input_gradient = follower("linear_input_gradient", "dy W: the gradient of x in x W^T", spec="0", follows="linear")

# The four columns in every pair of bytes, as one number of 16 bytes: one lookup finds them all.
_FOURS = np.concatenate([np.tile(mxfp4.PAIRS, (256, 1)), np.repeat(mxfp4.PAIRS, 256, 0)], 1).view(np.complex128)[:, 0]


@input_gradient.variant("paddle", "paddle.matmul on folded rows")
def paddle_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., out], weight [out, in] -> [..., in]."""
    return paddle.matmul(dy.reshape([-1, dy.shape[-1]]), weight).reshape([*dy.shape[:-1], weight.shape[1]])


@megatron_order(input_gradient, "dy W on the N-D dy")
def megatron_input_gradient(K, dy, weight):
    return K.matmul(dy, weight)


@differentiable
def packed_linear(x: Tensor, packed: Tensor, scales: Tensor, linear: Callable, dx: Callable):
    """x [..., in], packed int8 [out, in / 2], scales uint8 [out, in / 32] -> [..., out].

    ``linear`` and ``dx``: what the layer's policy chose for the op ``linear`` and for :data:`input_gradient`.
    """
    dtype = "float32" if x.dtype == paddle.bfloat16 and hasattr(linear, "takes_float32") else dtype_name(x)

    def backward(dy):
        return dx(dy, dequantize(packed, scales, dtype)), None, None

    return linear(x, dequantize(packed, scales, dtype)), backward


def dequantize(packed: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """packed int8 [out, in / 2], scales uint8 [out, in / 32] -> [out, in] in ``dtype``, exact in all of them.

    Raises:
        ValueError: scales of another shape or dtype: no weight without its scales.
    """
    rows, half = packed.shape
    if scales.dtype != paddle.uint8 or scales.shape != [rows, 2 * half // mxfp4.BLOCK]:
        raise ValueError(f"scales {scales.shape} of {scales.dtype} do not belong to packed weights {packed.shape}")
    if packed.place.is_cpu_place():
        return _on_cpu(packed.numpy(), scales.numpy(), dtype)
    pairs = paddle.gather(paddle.to_tensor(mxfp4.PAIRS), packed.view("uint8").astype("int32").flatten())
    factors = paddle.gather(paddle.to_tensor(E8M0), scales.astype("int32").flatten())
    return (pairs.reshape([-1, mxfp4.BLOCK]) * factors.unsqueeze(1)).reshape([rows, 2 * half]).astype(dtype)


def _on_cpu(packed: np.ndarray, scales: np.ndarray, dtype: str) -> Tensor:
    """The same with numpy: 0.8 nanoseconds an element where Paddle's kernels take 7, and 3 more for bfloat16."""
    values = _FOURS.take(packed.view(np.uint16), mode="clip").view(np.float32)
    blocks = values.reshape(*scales.shape, mxfp4.BLOCK)
    np.multiply(blocks, E8M0[scales][..., None], out=blocks)
    if dtype == "bfloat16":  # the upper half of a float32; of these numbers the lower one is zero
        return paddle.to_tensor(np.ascontiguousarray(values.view(np.int16)[:, 1::2])).view("bfloat16")
    return paddle.to_tensor(values) if dtype == "float32" else paddle.to_tensor(values).astype(dtype)
