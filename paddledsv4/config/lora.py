"""Low-rank adapters, under the names of peft."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.training import Count

ATTENTION = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_proj", "linear_proj")
EXPERTS = ("linear_fc1", "linear_fc2")  # of routed and shared experts
GROUPED = "linear_o_group_proj"


class LoraConfig(StrictConfig):
    """W + lora_alpha / r * B A instead of W, with A [r, in] and B [out, r] in float32, and W frozen.

    ``target_modules`` as in peft: a list of names, each the end of a layer's path; or a regular expression for whole
    paths; or "all-linear", which is the default list. The grouped output projection has to be named to be adapted.
    """

    SECTION: ClassVar[str] = "lora."

    r: Count = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    target_modules: Any = (*ATTENTION, *EXPERTS)

    @model_validator(mode="after")
    def _targets_are_names(self) -> Self:
        targets = self.target_modules
        names = targets if isinstance(targets, list | tuple) else [targets]
        if not names or not all(isinstance(name, str) and name for name in names):
            self.reject("target_modules", "must be a list of names, a regular expression, or all-linear")
        return self

    @property
    def scale(self) -> float:
        """What B A counts."""
        return self.lora_alpha / self.r
