"""AdamW over parameter groups, with gradients accumulated in float32 and clipped by their global norm."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from paddledsv4.config import TrainConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.ops.precision import widen
from paddledsv4.training.gradients import MainGradients, Named, parts, sum_slices, total_norm
from paddledsv4.weights.shards import on_slices


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
    """Order of the parameters: those with two or more dimensions (decayed), then the others (not decayed); frozen ones
    are left out.

    The global norm is taken in that order (spec section 13), of dense and expert parameters apart where experts are
    spread over ranks. ``sequence_parallel``: as the model was built.
    """

    def __init__(
        self, model: nn.Layer, train: TrainConfig, groups: Groups = ALONE, sequence_parallel: bool = False
    ):
        self.ops = model.ops
        self.config, self.clip = train.optimizer, train.clip_grad_norm
        self.step_count = 0
        pieces = parts(model, groups)
        self.gradients = MainGradients(pieces, groups.replicas.size)
        self.parts = [[self._state(*named) for named in _decayed_first(piece.named)] for piece in pieces]
        self.shards = [piece.shards for piece in pieces]
        self.counted = [
            [state.main_grad for state in part if state.name in piece.counted]
            for part, piece in zip(self.parts, pieces, strict=True)
        ]
        self.states = [state for part in self.parts for state in part]
        self.tensor = groups.tensor
        self.sliced = [s.main_grad for s in self.states if sequence_parallel and on_slices(s.name)]

    def _state(self, name: str, parameter: Tensor) -> ParameterState:
        decay = self.config.weight_decay if parameter.ndim >= 2 else 0.0
        moments = (paddle.zeros(parameter.shape, widen(parameter).dtype) for _ in range(2))
        return ParameterState(name, parameter, decay, widen(parameter.detach()), self.gradients[name], *moments)

    @paddle.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of one microbatch to the main gradients and drop them.

        Without autograd: some gradients that Paddle hands out ask for one themselves, and a main gradient that they
        are added to would keep a node, and what it holds, of every microbatch of the run.
        """
        for state in self.states:
            if state.parameter.grad is not None:
                state.main_grad.add_(widen(state.parameter.grad))
                state.parameter.grad = None

    @paddle.no_grad()
    def step(self, learning_rate: float) -> float:
        """Average over ranks, clip, update every parameter, zero the main gradients. Returns the norm before clipping.
        """
        self.gradients.average()
        sum_slices(self.sliced, self.tensor)
        norms = [self.ops.grad_norm(gradients) if gradients else 0.0 for gradients in self.counted]
        norm = total_norm(self.shards, norms, self.states[0].main_grad.dtype)
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


def _decayed_first(named: Named) -> Named:
    return sorted(named, key=lambda item: item[1].ndim < 2)  # stable: the model's order inside both
