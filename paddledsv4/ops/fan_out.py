"""Where one activation feeds several consumers: in which order their gradients are added is a numeric choice."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

fan_out = define("fan_out", "one tensor for several consumers; their gradients are added last consumer first",
                 spec="12", outputs=("copy",))
add = define("add", "sum of two activations of one shape, or of a stream-less and a multi-stream one", spec="9, 10")


@fan_out.variant("paddle", "the tensor itself; Paddle's autograd adds as gradients arrive")
def paddle_fan_out(x: Tensor, consumers: int) -> tuple[Tensor, ...]:
    """x -> ``consumers`` times x, given out in the order in which the forward pass uses them."""
    return (x,) * consumers


@megatron_order(fan_out, "((g[n-1] + g[n-2]) + ...) + g[0], as reversed creation order gives in the reference",
                explicit=True,
                same_bits="a few additions in a stated order")
def megatron_fan_out(K, x, consumers):
    def backward(*grads):
        total = grads[-1]
        for g in reversed(grads[:-1]):
            total = total + g
        return (total,)

    return tuple(K.alias(x) for _ in range(consumers)), backward


@add.variant("paddle", "paddle add with broadcast", same_bits="one addition")
def paddle_add(a: Tensor, b: Tensor) -> Tensor:
    """a [...], b of the same shape or broadcastable to it -> their sum."""
    return a + b


@megatron_order(add, "a + b in the dtype of the activations",
                same_bits="one addition")
def megatron_add(K, a, b):
    return a + b
