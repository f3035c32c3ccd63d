"""What tests of the PaddleFormers adapter share: a small model in both trainers, and every loss of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddleformers", reason="needs an environment with the extra formers: make test-formers")

from paddleformers.trainer import Trainer, TrainingArguments
from small_model import configs

from paddledsv4 import formers
from paddledsv4.config import ModelConfig, TrainConfig
from paddledsv4.formers.config import LOSSES, PRECISIONS
from paddledsv4.formers.trainer import adapted
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer as OurTrainer
from paddledsv4.weights.load import load_megatron_state, named_tensors

Losses = list[tuple[float, float | None]]


def settings(**changes) -> tuple[ModelConfig, TrainConfig]:
    """The smallest model with every mechanism, trained for ten steps of two microbatches."""
    return configs(**{"gradient_accumulation_steps": 2, "steps": 10, "indexer_loss_scale": "megatron"} | changes)


def table(model: ModelConfig, train: TrainConfig) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.vocab_size, (80, train.sequence_length + 1))


def our_trainer(model, train, preset="paddle", precision="fp32", **more) -> OurTrainer:
    more = {"tokens": table(model, train)} | more
    return OurTrainer(model, train, Policy.preset(preset), precision=precision, **more)


def our_losses(runner: OurTrainer) -> Losses:
    return [(x.main, x.mtp) for result in runner.train(runner.train_config.steps) for x in result.losses]


def formers_config(model, train, preset="paddle", precision="fp32") -> formers.DeepseekV4Config:
    dtype = next(name for name, short in PRECISIONS.items() if short == precision)
    losses = {name: getattr(train, name) for name in LOSSES}
    return formers.DeepseekV4Config(**model.model_dump(), **losses, dtype=dtype, numerics=preset)


def formers_model(model, train, preset="paddle", precision="fp32", state=None) -> formers.DeepseekV4ForCausalLM:
    built = formers.DeepseekV4ForCausalLM(formers_config(model, train, preset, precision))
    load_megatron_state(built.model, state or state_of(our_trainer(model, train, preset, precision).model))
    return built


def state_of(model) -> dict[str, np.ndarray]:
    """Parameters and buffers, wide enough to keep every number."""
    return {
        name: (tensor.astype("float64") if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in named_tensors(model).items()
    }


def arguments(train: TrainConfig, folder: Path, **more) -> TrainingArguments:
    optimizer = train.optimizer
    values = {
        "output_dir": str(folder), "device": "cpu", "amp_master_grad": False, "dataloader_shuffle": False,
        "disable_tqdm": True, "save_strategy": "no", "max_steps": train.steps, "seed": train.seed,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps, "learning_rate": optimizer.lr,
        "lr_scheduler_type": optimizer.schedule, "min_lr": optimizer.min_lr, "warmup_steps": optimizer.warmup_steps,
        "adam_beta1": optimizer.betas[0], "adam_beta2": optimizer.betas[1], "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay, "max_grad_norm": train.clip_grad_norm,
    }  # fmt: skip
    return TrainingArguments(**values | more)


def data_set(tokens: np.ndarray) -> list[dict[str, np.ndarray]]:
    """A data set in PaddleFormers' form: labels are shifted."""
    return [{"input_ids": row[:-1].astype("int64"), "labels": row[1:].astype("int64")} for row in tokens]


def formers_trainer(
    model, args: TrainingArguments, tokens: np.ndarray, ours: bool = True, callbacks: Iterable = (), **more
) -> Trainer:
    optimizers = {"optimizers": formers.optimizers(model, args)} if ours else {}
    callbacks = [formers.ExpertBias(), *callbacks]
    return Trainer(model=model, args=args, train_dataset=data_set(tokens), callbacks=callbacks, **optimizers, **more)


def formers_losses(trainer: Trainer, resume: str | None = None) -> Losses:
    losses: Losses = []

    def record(_, __, output) -> None:
        losses.append((float(output["main_loss"]), None if output["mtp_loss"] is None else float(output["mtp_loss"])))

    hook = adapted(trainer.model).register_forward_post_hook(record)
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    return losses
