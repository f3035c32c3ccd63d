"""The training loop of one rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle

from paddledsv4.config import LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.distributed.connect import check_same
from paddledsv4.distributed.context_parallel import check_sequences
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.errors import UserError
from paddledsv4.model import DTYPES, DeepseekV4Model
from paddledsv4.moe.experts import local_experts
from paddledsv4.moe.mxfp4 import with_packed_experts
from paddledsv4.numerics.policy import Policy
from paddledsv4.observe.steps import StepObserver
from paddledsv4.sft.lora import attach
from paddledsv4.training.data import Microbatch, Source, TokenTable, first_row, rows_per_step
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.schedule import learning_rate
from paddledsv4.training.step import StepResult, train_step
from paddledsv4.transformer.build import unset_parameters
from paddledsv4.weights.from_checkpoint import load_checkpoint
from paddledsv4.weights.load import (
    expert_index,
    load_megatron_state,
    named_tensors,
    weights_md5,
    without_other_experts,
)
from paddledsv4.weights.shards import shards_of_rank, split_of


class Trainer:
    """Builds the model and trains it on rows of tokens.

    Args:
        model: what is computed.
        train: how; its precision is used unless ``precision`` ("fp32", "bf16" or "fp64") is given.
        policy: numeric variants, resolved here.
        tokens: integers [rows, sequence_length + 1], or another source of rows.
        initial_state: parameters and buffers under Megatron's names; None draws them from ``train.seed``.
        weights: a checkpoint of any format to start from instead, which each rank reads its part of.
        lora: adapters to train in place of the model, which is frozen then, its expert biases included.
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
        tokens: np.ndarray | Source,
        initial_state: Mapping[str, np.ndarray] | None = None,
        precision: str | None = None,
        parallel: ParallelConfig | None = None,
        groups: Groups = ALONE,
        weights: Path | None = None,
        lora: LoraConfig | None = None,
    ):
        train = train.replace(expert_bias_update_rate=0.0) if lora else train
        precision = precision or train.precision
        if precision not in DTYPES:
            raise UserError(f"precision {precision!r} cannot be run yet; choose one of: {', '.join(DTYPES)}")
        paddle.seed(train.seed)
        self.train_config, self.policy, self.precision = train, policy, precision
        self.parallel, self.groups = parallel or ParallelConfig(), groups
        is_table = isinstance(tokens, np.ndarray)
        self.source = TokenTable(tokens, train, self.parallel, groups.context.rank) if is_table else tokens
        check_sequences(model, train, self.parallel)
        sequence_parallel = self.parallel.sequence_parallel and groups.tensor.size > 1
        slices = self.parallel.tensor * self.parallel.context
        if sequence_parallel and train.sequence_length % slices:
            self.parallel.reject(
                "sequence_parallel",
                f"tensor x context ({slices}) must divide training.sequence_length ({train.sequence_length})",
            )
        with unset_parameters() if weights else contextlib.nullcontext():
            self.model = DeepseekV4Model(
                model, policy, precision, groups, sequence_parallel, train.linear_cross_entropy,
                train.expert_weight_format, train.kv_qat, train.indexer_qat,
            )
        if weights:
            load_checkpoint(self.model, weights, groups)
        if initial_state is not None:
            here = local_experts(model.n_routed_experts, groups.expert)
            experts_here = without_other_experts(initial_state, here, model.n_routed_experts)
            load_megatron_state(self.model, with_packed_experts(shards_of_rank(experts_here, groups), self.model))
        self.lora = lora
        self.frozen = frozenset(named_tensors(self.model) if lora else ())
        if lora:
            attach(self.model, lora, train.seed)
        self.optimizer = Optimizer(self.model, train, groups, sequence_parallel)
        self.rows_skipped = 0
        self.observers: list[StepObserver] = []
        if groups.world.size > 1:
            self.check_ranks()

    def check_ranks(self) -> None:
        """Compare with the other ranks: configuration, tokens, and the parameters that ranks share.

        Raises:
            UserError: on every rank, if one differs.
        """
        check_same(self.groups.world, {
            "the lora section": self.lora.model_dump_json() if self.lora else "",
            "the model": self.model.config.model_dump_json(),
            "the training section": self.train_config.model_dump_json(),
            "the numerics policy": self.policy.fingerprint,
            "the precision": self.precision,
            "the data": self.source.fingerprint,
        })
        model, groups = self.model, self.groups
        check_same(groups.replicas, {"the weights": weights_md5(model, is_dense)})
        check_same(groups.tensor, {"the weights": weights_md5(model, lambda n: is_dense(n) and not split_of(n))})
        check_same(groups.expert_data, {"the experts' weights": weights_md5(model, lambda n: not is_dense(n))})

    def train(self, steps: int) -> Iterator[StepResult]:
        """The steps up to number ``steps``, one result each; the first is 1, or the one after the resumed one.

        Every step seeds Paddle's generator anew, from the run's seed, its own number and the data rank: the state of
        that generator can be read but not set.
        """
        for step in range(self.optimizer.step_count + 1, steps + 1):
            seed = np.random.SeedSequence([self.train_config.seed, step, self.groups.data.rank])
            paddle.seed(int(seed.generate_state(1)[0]))
            for observer in self.observers:
                observer.begin_step(step)
            result = train_step(
                self.model, self.optimizer, self.train_config, step,
                functools.partial(self._begin_microbatch, step),
                learning_rate(self.train_config.optimizer, step, self.train_config.steps), self.groups,
            )
            for observer in self.observers:
                observer.end_step(result)
            yield result

    def _begin_microbatch(self, step: int, index: int) -> Microbatch:
        for observer in self.observers:
            observer.begin_microbatch(index)
        return self.microbatch(step, index)

    def microbatch(self, step: int, index: int) -> Microbatch:
        """Microbatch ``index`` (from 0) of step ``step`` (from 1) of this rank."""
        train = self.train_config
        first = first_row(step - 1, index, self.groups.data.rank, train, self.parallel)
        return self.source.rows(self.rows_skipped + first, train.micro_batch_size)

    def rows_seen(self, step: int) -> int:
        """Rows of the source that ``step`` completed steps have taken: where the next one begins."""
        return self.rows_skipped + step * rows_per_step(self.train_config, self.parallel)

    def go_on_after(self, step: int, rows_seen: int) -> None:
        """The next step is the one after ``step`` and begins at row ``rows_seen`` of the source."""
        self.optimizer.step_count = step
        self.rows_skipped += rows_seen - self.rows_seen(step)

    @functools.cached_property
    def base_md5(self) -> str:
        """MD5 of the frozen parameters that all ranks share: which model the adapters belong to."""
        return weights_md5(self.model, lambda name: name in self.frozen and is_dense(name))

    def weights_md5(self) -> str:
        """MD5 over the raw bytes of all parameters in sorted name order."""
        return weights_md5(self.model)


def is_dense(name: str) -> bool:
    """Whether a parameter belongs to no routed expert."""
    return expert_index(name) is None
