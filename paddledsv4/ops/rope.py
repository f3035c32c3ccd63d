"""Rotary position embedding on the last dimensions, interleaved: pairs (x[2i], x[2i+1]) turn by an angle."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen

rope = define("rope", "rotation of interleaved pairs in the last rotary dimensions; inverse on the output", spec="6")


def _turns(cos: Tensor, sin: Tensor, rows: int, pairs: int) -> Tensor:
    """[s, P/2] -> complex [s, rows, pairs]: the turn of every pair, none for those before the rotary ones.

    Expanded as real numbers: Paddle's CPU takes twenty times as long to expand complex ones.
    """
    s, rest = cos.shape[0], [cos.shape[0], pairs - cos.shape[1]]
    real = paddle.concat([paddle.ones(rest, cos.dtype), cos], -1)
    imaginary = paddle.concat([paddle.zeros(rest, cos.dtype), sin], -1)
    turns = paddle.stack([real, imaginary], -1).reshape([s, 1, 2 * pairs]).expand([s, rows, 2 * pairs])
    return paddle.as_complex(turns.reshape([s, rows, pairs, 2]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One complex product over whole rows: no strided slices, no concatenation."""
    s, pairs = x.shape[0], x.shape[-1] // 2
    z = paddle.as_complex(widen(x).reshape([s, -1, pairs, 2]))
    turned = z * _turns(widen(cos), widen(sin), z.shape[1], pairs)
    return paddle.as_real(turned).reshape(x.shape).astype(x.dtype)


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = 2 * cos.shape[-1]
    per_row = [cos.shape[0], *[1] * (x.ndim - 2), cos.shape[1]]
    cos, sin = cos.astype(x.dtype).reshape(per_row), sin.astype(x.dtype).reshape(per_row)
    fixed, pairs = x[..., :-rotary], x[..., -rotary:].reshape([*x.shape[:-1], rotary // 2, 2])
    even, odd = paddle.unbind(pairs, -1)
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return paddle.concat([fixed, turned.reshape([*x.shape[:-1], rotary])], -1)


@rope.variant("paddle", "a complex product in float32 or wider; backward is the inverse rotation",
              same_bits="two products and a sum per number, each rounded")
@differentiable
def paddle_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False):
    """x [s, ..., D] with D even, cos and sin [s, P/2] -> [s, ..., D]; the first D-P dimensions pass unchanged."""
    turn = -sin if inverse else sin
    return _rotate(x, cos, turn), lambda dy: (_rotate(dy, cos, -turn), None, None)


@rope.variant("plain", "the rotation, differentiated by autograd",
              same_bits="two products and a sum per number, each rounded")
def plain_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    return _plain_rotate(x, cos, -sin if inverse else sin)


@megatron_order(rope, "de-interleave, t cos + rotate_half(t) sin, interleave; table cast to the dtype of x",
                same_bits="two products and a sum per number, each rounded")
def megatron_rope(K, x, cos, sin, inverse=False):
    rotary = 2 * cos.shape[-1]
    per_row = [cos.shape[0], *[1] * (x.ndim - 2), rotary]
    cos = K.cast(K.cat([cos, cos], -1).reshape(per_row), K.dtype(x))
    sin = K.cast(K.cat([sin, sin], -1).reshape(per_row), K.dtype(x))
    sin = -sin if inverse else sin
    fixed, turning = K.split(x, [x.shape[-1] - rotary, rotary], -1)
    t = K.cat([turning[..., 0::2], turning[..., 1::2]], -1)
    first, second = K.chunk(t, 2, -1)
    t = t * cos + K.cat([-second, first], -1) * sin
    first, second = K.chunk(t, 2, -1)
    return K.cat([fixed, K.stack([first, second], -1).reshape(turning.shape)], -1)
