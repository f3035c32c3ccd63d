"""The learning rate of every step, as Megatron's scheduler counts them."""

from __future__ import annotations

import math

from paddledsv4.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 1) in a run of ``total_steps``.

    The schedule sees the number of completed steps, ``step - 1``, as in Megatron: the first of n > 0 warm-up
    steps runs at 0 and step n + 1 at the full rate. A cosine or linear decay then falls from ``lr`` to
    ``min_lr``, which ``total_steps`` completed steps would reach; later steps stay there.
    """
    done, warmup = step - 1, optimizer.warmup_steps
    if done < warmup:
        return optimizer.lr * done / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    if done >= total_steps:
        return optimizer.min_lr
    progress = (done - warmup) / (total_steps - warmup)
    remaining = (
        1.0 - progress if optimizer.schedule == "linear" else 0.5 * (math.cos(math.pi * progress) + 1.0)
    )
    return optimizer.min_lr + remaining * (optimizer.lr - optimizer.min_lr)
