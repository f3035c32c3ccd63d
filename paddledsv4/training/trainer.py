"""The training loop on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import paddle

from paddledsv4.config import ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.model import DTYPES, DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.data import batches
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.schedule import learning_rate
from paddledsv4.training.step import StepResult, train_step
from paddledsv4.weights.load import load_megatron_state, weights_md5


class Trainer:
    """Builds the model and trains it on a table of tokens.

    Args:
        model: what is computed.
        train: how; its precision is used unless ``precision`` ("fp32", "bf16" or "fp64") is given.
        policy: numeric variants, resolved here.
        tokens: integers [rows, sequence_length + 1].
        initial_state: parameters and buffers under Megatron's names; None draws them from ``train.seed``.

    Raises:
        UserError: a precision that this build cannot run, or a state that does not fit the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        policy: Policy,
        tokens: np.ndarray,
        initial_state: Mapping[str, np.ndarray] | None = None,
        precision: str | None = None,
    ):
        precision = precision or train.precision
        if precision not in DTYPES:
            raise UserError(f"precision {precision!r} cannot be run yet; choose one of: {', '.join(DTYPES)}")
        paddle.seed(train.seed)
        self.train_config, self.policy, self.tokens, self.precision = train, policy, tokens, precision
        self.parallel = ParallelConfig()
        self.model = DeepseekV4Model(model, policy, precision)
        if initial_state is not None:
            load_megatron_state(self.model, initial_state)
        self.optimizer = Optimizer(self.model, train)

    def train(self, steps: int) -> Iterator[StepResult]:
        """Steps 1 to ``steps``, one result each."""
        for step in range(self.optimizer.step_count + 1, steps + 1):
            yield train_step(
                self.model, self.optimizer, self.train_config, step,
                lambda index, step=step: batches(
                    self.tokens, step - 1, index, 0, self.train_config, self.parallel
                ),
                learning_rate(self.train_config.optimizer, step, self.train_config.steps),
            )

    def weights_md5(self) -> str:
        """MD5 over the raw bytes of all parameters in sorted name order."""
        return weights_md5(self.model)
