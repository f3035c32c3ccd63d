"""Numeric choices that are no op: fields of the training section, with a variable each and a row in the table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from paddledsv4.config import TrainConfig
from paddledsv4.errors import UserError


@dataclass(frozen=True)
class Setting:
    """A field of ``training`` with few values. ``variants``: value -> what it means; ``spec`` as in the registry,
    "peers" standing for peers-spec.md."""

    name: str
    summary: str
    spec: str
    variants: dict[str, str]

    @property
    def environment_variable(self) -> str:
        """The variable that chooses where the training section is silent."""
        return f"PADDLEDSV4_{self.name.upper()}"

    @property
    def default(self) -> str:
        """What holds where nothing is said."""
        return TrainConfig.model_fields[self.name].default


SETTINGS = (
    Setting(
        "indexer_loss_scale", "weight of the indexer's loss in every microbatch; a setting of the training section",
        "8.3", {
            "megatron": "1, as the reference: its gradient grows with the number of microbatches",
            "per_microbatch": "1 / number of microbatches, as all other losses",
        },
    ),
    Setting(
        "kv_qat", "rounding of keys and values, of the window and compressed; a setting of the training section",
        "peers 3.A", {
            "off": "none, as the reference",
            "ue8m0": "e4m3 over blocks of 64 but for the rotary dimensions, scales powers of two, as DeepSeek serves",
            "fp32_scale": "the same with scales amax / 448",
        },
    ),
    Setting(
        "indexer_qat", "rounding of the indexer's queries and keys; a setting of the training section", "peers 3.A", {
            "off": "none, as the reference",
            "fp4": "e2m1 over blocks of 32 after the Hadamard rotation, scales powers of two, as DeepSeek serves",
        },
    ),
)  # fmt: skip


def from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """setting -> value, of those that the environment chooses.

    Raises:
        UserError: a value that the setting does not have.
    """
    chosen = {s.name: environ[s.environment_variable] for s in SETTINGS if s.environment_variable in environ}
    for setting in SETTINGS:
        value = chosen.get(setting.name)
        if value is not None and value not in setting.variants:
            raise UserError(
                f"environment variable {setting.environment_variable} = {value!r}: choose one of: "
                f"{', '.join(setting.variants)}"
            )
    return chosen


def with_environment(train: TrainConfig, environ: Mapping[str, str] = os.environ) -> TrainConfig:
    """``train`` with the environment's settings, where the section itself says nothing.

    Raises:
        UserError: as :func:`from_environment`.
    """
    silent = {name: value for name, value in from_environment(environ).items() if name not in train.model_fields_set}
    return train.replace(**silent) if silent else train
