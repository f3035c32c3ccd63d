"""Rotary position embedding on the last dimensions, interleaved: pairs (x[2i], x[2i+1]) turn by an angle."""

from __future__ import annotations

import functools

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import dtype_name

rope = define("rope", "rotation of interleaved pairs in the last rotary dimensions; inverse on the output", spec="6")


@functools.lru_cache(maxsize=8)
def _quarter_turn(width: int, dtype: str) -> Tensor:
    """[width, width]: x J = (-x1, x0, -x3, x2, ...). One exact GEMM; on a CPU far cheaper than strided slices."""
    j = np.kron(np.eye(width // 2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    return paddle.to_tensor(j, dtype=dtype)


def _interleaved(table: Tensor, like: Tensor) -> Tensor:
    """[s, P/2] -> the shape [s, ..., P] of ``like``: every angle for both members of its pair, for all heads."""
    table = paddle.repeat_interleave(table.astype(like.dtype), 2, axis=-1)
    return table.reshape([table.shape[0], *[1] * (like.ndim - 2), table.shape[1]]).expand(like.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    fixed, rotary = x[..., :-width], x[..., -width:]
    turned = paddle.matmul(rotary.reshape([-1, width]), _quarter_turn(width, dtype_name(x))).reshape(rotary.shape)
    rotated = rotary * _interleaved(cos, rotary) + turned * _interleaved(sin, rotary)
    return paddle.concat([fixed, rotated], -1)


@rope.variant("paddle", "in the dtype of x; backward is the inverse rotation")
@differentiable
def paddle_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False):
    """x [s, ..., D], cos and sin [s, P/2] -> [s, ..., D]; the first D-P dimensions pass through unchanged."""
    turn = -sin if inverse else sin
    return _rotate(x, cos, turn), lambda dy: (_rotate(dy, cos, -turn), None, None)


@rope.variant("plain", "the rotation, differentiated by autograd")
def plain_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    return _rotate(x, cos, -sin if inverse else sin)
