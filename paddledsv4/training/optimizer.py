"""AdamW over parameter groups, with gradients accumulated in float32 and clipped by their global norm."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from paddledsv4.config import TrainConfig
from paddledsv4.ops.precision import widen


@dataclass
class ParameterState:
    """A parameter with what the optimizer keeps for it, all in float32 or wider: the master that is updated (the
    parameter itself unless that is narrower), accumulated gradient, first and second moment."""

    name: str
    parameter: Tensor
    weight_decay: float
    master: Tensor
    main_grad: Tensor
    m: Tensor
    v: Tensor


class Optimizer:
    """Order of the parameters: those with two or more dimensions (decayed), then the others (not decayed).

    The global norm is taken in that order (spec section 13).
    """

    def __init__(self, model: nn.Layer, train: TrainConfig):
        self.ops = model.ops
        self.config, self.clip = train.optimizer, train.clip_grad_norm
        self.step_count = 0
        named = list(model.named_parameters())
        decayed = [(n, p, self.config.weight_decay) for n, p in named if p.ndim >= 2]
        others = [(n, p, 0.0) for n, p in named if p.ndim < 2]
        self.states = [
            ParameterState(
                name, p, decay, widen(p.detach()), *(paddle.zeros(p.shape, widen(p).dtype) for _ in range(3))
            )
            for name, p, decay in decayed + others
        ]

    def accumulate(self) -> None:
        """Add the gradients of one microbatch to the main gradients and drop them."""
        for state in self.states:
            if state.parameter.grad is not None:
                state.main_grad.add_(widen(state.parameter.grad))
                state.parameter.grad = None

    @paddle.no_grad()
    def step(self, learning_rate: float) -> float:
        """Clip, update every parameter, zero the main gradients. Returns the norm before clipping."""
        norm = self.ops.grad_norm([state.main_grad for state in self.states])
        coefficient = self.clip / (norm + 1e-6) if self.clip else 1.0
        self.step_count += 1
        beta1, beta2 = self.config.betas
        for state in self.states:
            self.ops.adamw(
                state.master, state.main_grad, state.m, state.v,
                step=self.step_count, lr=learning_rate, beta1=beta1, beta2=beta2, eps=self.config.eps,
                weight_decay=state.weight_decay, scale=min(coefficient, 1.0),
            )
            state.main_grad.zero_()
            if state.master.dtype != state.parameter.dtype:
                paddle.assign(state.master.astype(state.parameter.dtype), state.parameter)
        return norm
