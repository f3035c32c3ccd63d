"""PaddleFormers' configuration of our model: Hugging Face's field names, and what PaddleFormers itself keeps there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddle
from paddleformers.transformers import PretrainedConfig

from paddledsv4.config import ModelConfig, TrainConfig
from paddledsv4.config.base import did_you_mean
from paddledsv4.config.huggingface import FIXED_VALUES, IGNORED_KEYS, TRANSFORMERS_KEYS
from paddledsv4.errors import UserError

# Fields of a training section that PaddleFormers' TrainingArguments have no place for.
LOSSES = (
    "mtp_loss_scaling_factor", "indexer_loss_coeff", "indexer_sparse_loss", "indexer_loss_scale", "seq_aux_loss_coeff",
    "expert_bias_update_rate", "linear_cross_entropy",
)  # fmt: skip
PRECISIONS = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}
PACKING = ("expert_dtype", "quantization_config")  # of the files; in memory nothing is packed
ARCHITECTURE = "DeepseekV4ForCausalLM"


class DeepseekV4Config(PretrainedConfig):
    """A released config.json, one written by transformers or by us, and in addition

    * the fields of a training section that belong to the losses (``LOSSES``), with the same defaults;
    * ``numerics``: a preset; None leaves it to the environment;
    * ``dtype``: "float32", "float64" or "bfloat16"; None is Paddle's default.

    None of the last three is saved with the model, apart from the dtype.

    Raises:
        UserError: a key that neither we nor PaddleFormers know, or fields of the model that contradict one another.
    """

    model_type = "deepseek_v4"

    def __init__(self, **values: Any):
        shape = {name: values.pop(name) for name in list(values) if name in SHAPE_KEYS}
        losses = {name: values.pop(name, TrainConfig.model_fields[name].default) for name in LOSSES}
        self.numerics = values.pop("numerics", None)
        shape.pop("model_type", None)
        super().__init__(tie_word_embeddings=False, **values)
        plain = vars(PretrainedConfig())
        for name in values:
            if name not in plain and name not in IGNORED_KEYS:
                raise UserError(f"{name} is not a known key{did_you_mean(name, [*SHAPE_KEYS, *plain])}")
        for name, field in ModelConfig.model_fields.items():
            setattr(self, name, None if field.is_required() else field.default)
        if shape:
            for name, value in ModelConfig.from_dict(shape).model_dump().items():
                setattr(self, name, value)
        self.quantization_config = PretrainedConfig().quantization_config
        self.expert_dtype = None
        for name, value in losses.items():
            setattr(self, name, value)

    def model_config(self) -> ModelConfig:
        """What our model is built from.

        Raises:
            UserError: a missing or illegal field.
        """
        values = {name: getattr(self, name) for name in ModelConfig.model_fields if name not in PACKING}
        return ModelConfig.from_dict({name: value for name, value in values.items() if value is not None})

    def precision(self) -> str:
        """fp32, fp64 or bf16.

        Raises:
            UserError: another dtype.
        """
        dtype = str(self.dtype or paddle.get_default_dtype()).removeprefix("paddle.")
        if dtype not in PRECISIONS:
            raise UserError(f"dtype = {dtype!r}: must be one of: {', '.join(PRECISIONS)}")
        return PRECISIONS[dtype]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write a config.json that paddledsv4, PaddleFormers and transformers' readers of raw configs understand."""
        values = {"architectures": [ARCHITECTURE], "torch_dtype": _dtype_name(self.precision())}
        values |= {name: v for name, v in self.model_config().model_dump(mode="json").items() if v is not None}
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


SHAPE_KEYS = frozenset((*ModelConfig.model_fields, *FIXED_VALUES, *TRANSFORMERS_KEYS))


def _dtype_name(precision: str) -> str:
    return next(name for name, short in PRECISIONS.items() if short == precision)
