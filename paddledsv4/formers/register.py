"""The places where PaddleFormers' Auto classes look."""

from __future__ import annotations

import functools

import paddle
from paddleformers.transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PretrainedModel
from paddleformers.transformers.auto.modeling import MAPPING_NAMES


def register(config: type[PretrainedConfig], model: type[PretrainedModel]) -> None:
    """``config`` and ``model`` are what the Auto classes give for the config's model type."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # Class names come before registered classes; this one leads to the model that cannot be imported.
    MAPPING_NAMES.pop("DeepseekV4", None)


def synchronize_on_cpu() -> None:
    """A CPU has nothing to wait for. Paddle raises there, in the middle of a Trainer that accumulates gradients."""
    wait = paddle.device.synchronize
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def synchronize(device=None):
        if device is not None or paddle.device.get_device() != "cpu":
            wait(device)

    paddle.device.synchronize = synchronize
