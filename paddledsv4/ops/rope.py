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
def _quarter_turn(rotary: int, width: int, dtype: str) -> Tensor:
    """[rotary, width]: turns every pair by 90 degrees, (x0, x1) -> (-x1, x0), and puts the pairs behind zeros.

    One exact GEMM with entries 0, 1 and -1; on a CPU far cheaper than strided slices and a concatenation.
    """
    turn = np.kron(np.eye(rotary // 2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    return paddle.to_tensor(np.pad(turn, ((0, 0), (width - rotary, 0))), dtype=dtype)


def _full_width(table: Tensor, like: Tensor, fill: float) -> Tensor:
    """[s, P/2] -> the shape [s, ..., D] of ``like``: each angle for both of its pair, ``fill`` where nothing turns."""
    pairs = paddle.repeat_interleave(table.astype(like.dtype), 2, axis=-1)
    rest = paddle.full([pairs.shape[0], like.shape[-1] - pairs.shape[1]], fill, like.dtype)
    rows = paddle.concat([rest, pairs], -1)
    return rows.reshape([rows.shape[0], *[1] * (like.ndim - 2), rows.shape[1]]).expand(like.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width, rotary = x.shape[-1], 2 * cos.shape[-1]
    last = x[..., width - rotary :].reshape([-1, rotary])
    turned = paddle.matmul(last, _quarter_turn(rotary, width, dtype_name(x))).reshape(x.shape)
    return x * _full_width(cos, x, 1.0) + turned * _full_width(sin, x, 0.0)


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = 2 * cos.shape[-1]
    per_row = [cos.shape[0], *[1] * (x.ndim - 2), cos.shape[1]]
    cos, sin = cos.astype(x.dtype).reshape(per_row), sin.astype(x.dtype).reshape(per_row)
    fixed, pairs = x[..., :-rotary], x[..., -rotary:].reshape([*x.shape[:-1], rotary // 2, 2])
    even, odd = paddle.unbind(pairs, -1)
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return paddle.concat([fixed, turned.reshape([*x.shape[:-1], rotary])], -1)


@rope.variant("paddle", "in the dtype of x; backward is the inverse rotation")
@differentiable
def paddle_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False):
    """x [s, ..., D], cos and sin [s, P/2] -> [s, ..., D]; the first D-P dimensions pass through unchanged."""
    turn = -sin if inverse else sin
    return _rotate(x, cos, turn), lambda dy: (_rotate(dy, cos, -turn), None, None)


@rope.variant("plain", "the rotation, differentiated by autograd")
def plain_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    return _plain_rotate(x, cos, -sin if inverse else sin)
