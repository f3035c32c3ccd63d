"""The recipe of supervised fine-tuning: which model, on which conversations, how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.recipe import BaseRecipe
from paddledsv4.config.training import Count, TrainConfig
from paddledsv4.sft.dataset import ConversationConfig


class SftDataConfig(StrictConfig):
    """Where the conversations are.

    ``file``: .jsonl or .parquet. ``evaluation``: a second one that is only evaluated; without, the share ``held_out``
    of the first. ``tokenizer``: a tokenizer.json or its folder; DeepSeek's by default. ``workers``: processes that
    tokenise. ``multiple``: sequences are padded to a multiple of so many tokens.
    """

    SECTION: ClassVar[str] = "data."

    file: str
    evaluation: str | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    tokenizer: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    multiple: Count = 64

    @model_validator(mode="after")
    def _one_evaluation(self) -> Self:
        if self.evaluation is not None and "held_out" in self.model_fields_set and self.held_out:
            self.reject("held_out", "must be left out with data.evaluation, which is evaluated instead")
        return self


class SftRecipe(BaseRecipe):
    """As :class:`BaseRecipe`, with conversations for data.

    ``training.linear_cross_entropy`` is on unless the recipe says otherwise or tensor ranks share the vocabulary.
    ``conversations.max_tokens`` is ``training.sequence_length`` at most. ``evaluation_interval``: steps between two
    evaluations; there is one after the last step in any case. ``export``: whether the run ends by writing the weights.
    """

    training: TrainConfig
    data: SftDataConfig
    conversations: ConversationConfig = ConversationConfig()
    evaluation_interval: Count | None = None
    export: bool = True

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        training = values.get("training") if isinstance(values, dict) else None
        if isinstance(training, dict):
            parallel = values.get("parallel")
            alone = not isinstance(parallel, dict) or parallel.get("tensor", 1) == 1
            values = values | {"training": {"linear_cross_entropy": alone} | training}
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        length, longest = self.training.sequence_length, self.conversations.max_tokens
        if longest is not None and longest > length:
            self.conversations.reject("max_tokens", f"must be at most training.sequence_length ({length})")
        if self.parallel.context > 1:
            self.parallel.reject("context", "must be 1: packed documents are not cut over ranks")
        slices = self.parallel.tensor if self.parallel.sequence_parallel else 1
        if self.data.multiple % slices:
            self.data.reject("multiple", f"must be divisible by parallel.tensor ({slices}) with sequence_parallel")
        if self.export and self.parallel.expert > 1:
            self.reject("export", "must be false with parallel.expert > 1, where no rank has all experts")
        return self

    def located(self, folder: Path) -> Self:
        paths = ("file", "evaluation", "tokenizer")
        named = {name: getattr(self.data, name) for name in paths}
        here = {name: str((folder / path).resolve()) for name, path in named.items() if path is not None}
        if self.data.evaluation is not None:
            here["held_out"] = 0.0  # as it is, so that the recipe can be written and read again
        return super().located(folder).model_copy(update={"data": self.data.model_copy(update=here)})
