"""From the losses of tokens to the number that is logged and the gradient that training starts from."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen

loss_mean = define("loss_mean", "mean over unmasked tokens; its gradient starts from a seed", spec="1.1, 10",
                   outputs=("mean",))


@loss_mean.variant("paddle", "sum / count; every token's gradient is seed * factor / count")
@differentiable
def paddle_loss_mean(losses: Tensor, mask: Tensor, seed: float, factor: float):
    """losses and mask [b, s] -> mean, a scalar. Whatever gradient it receives is multiplied by seed * factor."""
    losses, mask = widen(losses), widen(mask)
    count = mask.sum().clip(min=1.0)
    return (losses * mask).sum() / count, lambda g: (mask * (g * (seed * factor) / count), None)


@megatron_order(loss_mean, "sum of the flat product / count; gradient ((seed / count) factor) mask", explicit=True,
                same_bits="Paddle's kernels add in torch's order")
def megatron_loss_mean(K, losses, mask, seed, factor):
    flat, weights = K.wide(losses).reshape([-1]), K.wide(mask).reshape([-1])
    count = K.clamp(K.sum(weights), 1.0, None)

    def backward(g):
        per_token = ((g * seed) / count) * factor
        return (per_token * weights).reshape(losses.shape), None

    return K.sum(flat * weights) / count, backward
