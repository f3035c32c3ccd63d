"""What our trainer does between gradients and weights, for PaddleFormers' Trainer::

    Trainer(model=model, args=args, train_dataset=rows, callbacks=[ExpertBias()], optimizers=optimizers(model, args))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle import Tensor
from paddleformers.trainer import TrainerCallback, TrainingArguments

from paddledsv4.config import OptimizerConfig, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.formers.lora import LoRAModel
from paddledsv4.formers.model import DeepseekV4ForCausalLM, loss_config
from paddledsv4.ops.precision import widen
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.schedule import learning_rate
from paddledsv4.training.step import auxiliary_losses

# What the Trainer can do to numbers and we do elsewhere: the precision is the model's dtype.
PLAIN = {"bf16": False, "fp16": False}


def adapted(model: DeepseekV4ForCausalLM | LoRAModel) -> DeepseekV4ForCausalLM:
    """The model itself, without the LoRAModel around it."""
    return model.model if isinstance(model, LoRAModel) else model


def train_config(model: DeepseekV4ForCausalLM | LoRAModel, args: TrainingArguments) -> TrainConfig:
    """The training section of a recipe that says the same. Parameters with one dimension are not decayed.

    Raises:
        UserError: a schedule or a value that a recipe cannot have, or no ``max_steps``.
    """
    for name, plain in PLAIN.items():
        if getattr(args, name) != plain:
            raise UserError(f"TrainingArguments.{name} = {getattr(args, name)!r}: must be {plain!r} with our optimizer")
    if args.max_steps < 1:
        raise UserError("TrainingArguments.max_steps must be given: our schedule counts steps, not epochs")
    return loss_config(
        adapted(model).config,
        micro_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        steps=args.max_steps,
        clip_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=OptimizerConfig(
            lr=args.learning_rate, schedule=getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=args.weight_decay,
            min_lr=args.min_lr, warmup_steps=args.warmup_steps or int(args.warmup_ratio * args.max_steps),
        ),
    )  # fmt: skip


def optimizers(
    model: DeepseekV4ForCausalLM | LoRAModel, args: TrainingArguments
) -> tuple[MegatronAdamW, Schedule]:
    """Our optimizer and schedule, for the Trainer's argument of that name."""
    train = train_config(model, args)
    schedule = Schedule(train)
    return MegatronAdamW(adapted(model), train, schedule), schedule


class Schedule(paddle.optimizer.lr.LRScheduler):
    """The learning rate of the next step, as Megatron's scheduler counts them."""

    def __init__(self, train: TrainConfig):
        self.train = train
        super().__init__(train.optimizer.lr)

    def get_lr(self) -> float:
        return learning_rate(self.train.optimizer, self.last_epoch + 1, self.train.steps)


class MegatronAdamW(paddle.optimizer.AdamW):
    """:class:`paddledsv4.training.optimizer.Optimizer` where a Trainer expects one of Paddle's.

    Gradients are accumulated in float32, in ``main_grad`` of every parameter, which the Trainer averages; another
    kind of optimizer would find none and needs a model of its own. Moments and master weights are those of Paddle's
    AdamW by name, so that the Trainer's checkpoints have them.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, train: TrainConfig, schedule: Schedule):
        self.inner = Optimizer(model.model, train)
        beta1, beta2 = train.optimizer.betas
        super().__init__(
            schedule, beta1, beta2, train.optimizer.eps, [state.parameter for state in self.inner.states],
            weight_decay=train.optimizer.weight_decay,
        )  # fmt: skip
        scale = train.gradient_accumulation_steps
        auxiliary = auxiliary_losses(train)  # the Trainer divides gradients where we divide losses
        model.auxiliary = replace(auxiliary, seed=1.0, indexer_seed=auxiliary.indexer_seed * scale)
        for state in self.inner.states:
            name = state.parameter.name
            for kind, moment in (("moment1", state.m), ("moment2", state.v)):
                moment.name = f"{name}_{kind}_0"
                self._accumulators[kind][name] = moment
            if state.master.dtype != state.parameter.dtype:
                self._master_weights[name] = state.master
            keep_main_grad(state.parameter, state.main_grad)

    @paddle.no_grad()
    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments, masters and the schedule of a checkpoint."""
        masters = self._master_weights
        super().set_state_dict(state_dict)
        for name, master in masters.items():
            paddle.assign(self._master_weights[name], master)
        self._master_weights = masters

    load_state_dict = set_state_dict

    @paddle.no_grad()
    def step(self) -> None:
        """Clip, update, and forget the gradients."""
        self.inner.step_count = self._learning_rate.last_epoch
        self.grad_norm = self.inner.step(self.get_lr())


def keep_main_grad(parameter: Tensor, main_grad: Tensor) -> None:
    """From now on gradients of ``parameter`` are added to ``main_grad`` and go nowhere else."""
    known = hasattr(parameter, "main_grad")
    parameter.main_grad = main_grad
    if known:
        return

    @paddle.no_grad()
    def hook(gradient: Tensor | None) -> None:
        if gradient is not None and gradient._is_initialized():
            parameter.main_grad.add_(widen(gradient))
            gradient._clear_data()

    parameter._register_grad_hook(hook)


class ExpertBias(TrainerCallback):
    """Balance of the experts: before every update their biases move towards an equal load.

    Without it, as with PaddleFormers' own optimizer alone, they stand still.
    """

    def on_optimizer_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        model = adapted(kwargs["model"])
        for router in model.model.learned_routers():
            router.update_expert_bias(model.config.expert_bias_update_rate)
