"""The training loop of one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle

from paddledsv4.config import ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.distributed.connect import check_same
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.errors import UserError
from paddledsv4.model import DTYPES, DeepseekV4Model
from paddledsv4.moe.experts import local_experts
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.data import batches
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.schedule import learning_rate
from paddledsv4.training.step import StepResult, train_step
from paddledsv4.transformer.build import unset_parameters
from paddledsv4.weights.from_checkpoint import load_checkpoint
from paddledsv4.weights.load import expert_index, load_megatron_state, weights_md5, without_other_experts


class Trainer:
    """Builds the model and trains it on a table of tokens.

    Args:
        model: what is computed.
        train: how; its precision is used unless ``precision`` ("fp32", "bf16" or "fp64") is given.
        policy: numeric variants, resolved here.
        tokens: integers [rows, sequence_length + 1].
        initial_state: parameters and buffers under Megatron's names; None draws them from ``train.seed``.
        weights: a checkpoint of any format to start from instead, which each rank reads its part of.
        parallel: the layout; ``groups``: what :func:`paddledsv4.distributed.connect.connect` gave for it.

    Raises:
        UserError: a precision that this build cannot run, a state that does not fit the model, or ranks that were given
            different configurations, tokens or weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        policy: Policy,
        tokens: np.ndarray,
        initial_state: Mapping[str, np.ndarray] | None = None,
        precision: str | None = None,
        parallel: ParallelConfig | None = None,
        groups: Groups = ALONE,
        weights: Path | None = None,
    ):
        precision = precision or train.precision
        if precision not in DTYPES:
            raise UserError(f"precision {precision!r} cannot be run yet; choose one of: {', '.join(DTYPES)}")
        paddle.seed(train.seed)
        self.train_config, self.policy, self.tokens, self.precision = train, policy, tokens, precision
        self.parallel, self.groups = parallel or ParallelConfig(), groups
        for name in ("tensor", "context"):
            if getattr(self.parallel, name) > 1:
                self.parallel.reject(name, "must be 1: there are no layers for it yet; use data and expert parallelism")
        with unset_parameters() if weights else contextlib.nullcontext():
            self.model = DeepseekV4Model(model, policy, precision, groups)
        if weights:
            load_checkpoint(self.model, weights, groups)
        if initial_state is not None:
            here = local_experts(model.n_routed_experts, groups.expert)
            load_megatron_state(self.model, without_other_experts(initial_state, here, model.n_routed_experts))
        self.optimizer = Optimizer(self.model, train, groups)
        if groups.world.size > 1:
            self.check_ranks()

    def check_ranks(self) -> None:
        """Compare with the other ranks: configuration, tokens, and the parameters that ranks share.

        Raises:
            UserError: on every rank, if one differs.
        """
        rows = np.ascontiguousarray(self.tokens[:: max(len(self.tokens) // 64, 1)])  # a sample of a table of any size
        check_same(self.groups.world, {
            "the model": self.model.config.model_dump_json(),
            "the training section": self.train_config.model_dump_json(),
            "the numerics policy": self.policy.fingerprint,
            "the precision": self.precision,
            "the token table": f"{self.tokens.shape} {self.tokens.dtype}".encode() + rows.tobytes(),
        })
        check_same(self.groups.replicas, {"the weights": weights_md5(self.model, lambda n: expert_index(n) is None)})
        check_same(self.groups.expert_data, {"the experts' weights": weights_md5(self.model)})

    def train(self, steps: int) -> Iterator[StepResult]:
        """Steps 1 to ``steps``, one result each."""
        for step in range(self.optimizer.step_count + 1, steps + 1):
            yield train_step(
                self.model, self.optimizer, self.train_config, step,
                lambda index, step=step: batches(
                    self.tokens, step - 1, index, self.groups.data.rank, self.train_config, self.parallel
                ),
                learning_rate(self.train_config.optimizer, step, self.train_config.steps), self.groups,
            )

    def weights_md5(self) -> str:
        """MD5 over the raw bytes of all parameters in sorted name order."""
        return weights_md5(self.model)
