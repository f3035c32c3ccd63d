"""Auxiliary losses that ride on an activation: it passes through unchanged, the loss gets its own gradient seed."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

attach_loss = define("attach_loss", "add an auxiliary loss to the graph of an activation", spec="8.3")


@attach_loss.variant("paddle", "identity on the activation, a constant seed for the loss",
                     same_bits="passes numbers on, computes none")
@differentiable
def paddle_attach_loss(x: Tensor, loss: Tensor, seed: float):
    """x of any shape -> the same x; in backward ``loss`` receives the gradient ``seed`` whatever x receives."""
    return x.clone(), lambda dx: (dx, paddle.full_like(loss, seed))


@megatron_order(attach_loss, "identity on the activation, a constant seed for the loss", explicit=True,
                same_bits="passes numbers on, computes none")
def megatron_attach_loss(K, x, loss, seed):
    return K.alias(x), lambda dx: (dx, K.full(list(loss.shape), seed, K.dtype(loss), like=loss))
