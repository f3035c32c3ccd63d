"""The Walsh-Hadamard rotation of the indexer's queries and keys (Sylvester order, scaled to be orthogonal)."""

from __future__ import annotations

import functools

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

hadamard = define("hadamard", "orthogonal Hadamard rotation of the last dimension", spec="8.2")


def sylvester(d: int) -> np.ndarray:
    """The d x d matrix of +1 and -1, d a power of two."""
    h = np.ones((1, 1))
    while h.shape[0] < d:
        h = np.block([[h, h], [h, -h]])
    return h


@functools.lru_cache(maxsize=8)
def _signs(d: int, dtype: paddle.dtype) -> Tensor:
    return paddle.to_tensor(sylvester(d), dtype=dtype)


@hadamard.variant("paddle", "one GEMM with the matrix of signs, then the scale")
def paddle_hadamard(x: Tensor) -> Tensor:
    """x [..., d] -> [..., d], d a power of two."""
    d = x.shape[-1]
    return paddle.matmul(x.reshape([-1, d]), _signs(d, x.dtype)).reshape(x.shape) * d**-0.5


def _butterfly(K, x):
    """Sums and differences at distances 1, 2, 4, ... in float32, then the scale."""
    d, shape = x.shape[-1], list(x.shape)
    y, distance = K.wide(x).reshape([-1, d]), 1
    while distance < d:
        pairs = y.reshape([-1, d // (2 * distance), 2, distance])
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = K.stack([a + b, a - b], 2).reshape([-1, d])
        distance *= 2
    return K.cast(y * d**-0.5, K.dtype(x)).reshape(shape)


@megatron_order(hadamard, "butterfly in float32, then the scale; backward is the same transform", explicit=True,
                same_bits="sums and differences of pairs in a stated order")
def megatron_hadamard(K, x):
    return _butterfly(K, x), lambda dy: (_butterfly(K, dy),)
