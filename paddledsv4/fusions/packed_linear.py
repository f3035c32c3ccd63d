"""A linear layer on a frozen MXFP4 weight that exists in full only while it is multiplied with.

It follows the switch ``linear``: forward is the function chosen there, on the unpacked weight, and the gradient of x is
computed as that function's backward does, so every bit is that of the unpacked weight. What is kept for backward are
the packed weight and its scales: not x, since the weight gets no gradient, and not the unpacked weight.

The ``fused`` variant unpacks tiles in a kernel's registers, and takes many experts in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check_rows, check_width, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import follower
from paddledsv4.ops.precision import dtype_name
from paddledsv4.weights import mxfp4
from paddledsv4.weights.fp8 import E8M0

input_gradient = follower("linear_input_gradient", "dy W: the gradient of x in x W^T", spec="0", follows="linear")

packed_product = follower("packed_linear", "x W^T on a frozen MXFP4 weight", spec="0", follows="linear")

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


packed_product.variant("paddle", "the function chosen for linear, on the unpacked weight", emulated=packed_linear)(
    packed_linear
)


@packed_product.variant("fused", "a Triton kernel that unpacks tiles", needs="triton", refuses=refusal)
def fused_packed_linear(x: Tensor, packed: Tensor, scales: Tensor, linear: Callable, dx: Callable) -> Tensor:
    """As :func:`packed_linear`; ``linear`` and ``dx`` are not asked."""
    rows = x.reshape([-1, x.shape[-1]])
    y = grouped_packed_linear(rows, paddle.full([1], rows.shape[0], "int64"), [packed], [scales])
    return y.reshape([*x.shape[:-1], packed.shape[0]])


def grouped_packed_linear(x: Tensor, counts: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """x [n, in] in groups of counts [experts] rows, for each group a packed weight and its scales -> [n, out], by the
    fused kernel.

    Raises:
        UserError: x is neither float32 nor bfloat16, or a row of the result has no multiple of 16 bytes.
        ValueError: weights that x does not fit, or scales that do not belong to them.
    """
    check_rows("the fused packed_linear", x)
    check_width("the fused packed_linear", packed[0].shape[0], x)
    for pair in zip(packed, scales, strict=True):
        check_scales(*pair)
    if x.shape[-1] != 2 * packed[0].shape[1]:
        raise ValueError(f"rows of {x.shape[-1]} numbers do not fit packed weights {packed[0].shape}")
    return _grouped(x, counts=counts, packed=packed, scales=scales)


@differentiable
def _grouped(x: Tensor, *, counts: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor]):
    from paddledsv4.kernels import packed_linear as kernel

    out, width = packed[0].shape[0], x.shape[-1]
    tables = [paddle.to_tensor([t.data_ptr() for t in tensors], dtype="int64") for tensors in (packed, scales)]

    def backward(dy, kept=(packed, scales)):  # whose addresses the tables have
        return (kernel.input_gradient(CARRIER, dy.contiguous(), *tables, counts, width),)

    return kernel.forward(CARRIER, x.contiguous(), *tables, counts, out), backward


def check_scales(packed: Tensor, scales: Tensor) -> None:
    """Raises ValueError: scales of another shape or dtype than the weight's."""
    rows, half = packed.shape
    if scales.dtype != paddle.uint8 or scales.shape != [rows, 2 * half // mxfp4.BLOCK]:
        raise ValueError(f"scales {scales.shape} of {scales.dtype} do not belong to packed weights {packed.shape}")


def dequantize(packed: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """packed int8 [out, in / 2], scales uint8 [out, in / 32] -> [out, in] in ``dtype``, exact in all of them.

    Raises:
        ValueError: scales of another shape or dtype: no weight without its scales.
    """
    check_scales(packed, scales)
    rows, half = packed.shape
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
