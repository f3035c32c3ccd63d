"""The Walsh-Hadamard rotation of the indexer's queries and keys (Sylvester order, scaled to be orthogonal)."""

from __future__ import annotations

import functools

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.numerics.registry import define

hadamard = define("hadamard", "orthogonal Hadamard rotation of the last dimension", spec="8.2")


@functools.lru_cache(maxsize=8)
def sylvester(d: int) -> np.ndarray:
    """The d x d matrix of +1 and -1, d a power of two."""
    h = np.ones((1, 1))
    while h.shape[0] < d:
        h = np.block([[h, h], [h, -h]])
    return h


@hadamard.variant("paddle", "one GEMM with the matrix of signs, then the scale")
def paddle_hadamard(x: Tensor) -> Tensor:
    """x [..., d] -> [..., d], d a power of two."""
    d = x.shape[-1]
    signs = paddle.to_tensor(sylvester(d), dtype=x.dtype)
    return paddle.matmul(x.reshape([-1, d]), signs).reshape(x.shape) * d**-0.5
