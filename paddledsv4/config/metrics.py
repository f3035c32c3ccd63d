"""Which metrics of a run are written, and how often."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.training import Count

Format = Literal["jsonl", "tensorboard", "visualdl"]


class MetricsConfig(StrictConfig):
    """Metrics beyond the log of losses.

    ``formats``: what to write beside ``metrics.jsonl``, which is written whenever this names anything; none by default.
    ``every``: after every so many steps.
    """

    SECTION: ClassVar[str] = "observe.metrics."

    formats: Annotated[tuple[Format, ...], Field(strict=False)] = ()
    every: Count = 10
