"""When a run saves its state, and where."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.training import Count


class CheckpointConfig(StrictConfig):
    """Checkpoints of a run, with Megatron's rules.

    ``dir``: the folder, relative to the working directory; left out, ``checkpoints`` in the run's own folder.
    ``save_interval``: every so many steps, and after the last one; left out, only when a signal stops the run.
    ``save_retain_interval``: when a checkpoint is complete, the one before it is deleted, unless its step is a multiple
    of this; None keeps all. ``warmup_save``: also after the first step of every process, never in the background.
    ``async``: written by a thread while training goes on.
    """

    SECTION: ClassVar[str] = "checkpoint."
    model_config = ConfigDict(populate_by_name=True)

    dir: str | None = None
    save_interval: Count | None = None
    save_retain_interval: Count | None = None
    warmup_save: bool = False
    asynchronous: bool = Field(False, alias="async")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.dir is not None and self.save_interval is None:
            self.reject("save_interval", "must be given with dir: after how many steps to save")
        if self.save_retain_interval is not None and self.save_retain_interval % (self.save_interval or 1):
            self.reject("save_retain_interval", f"must be a multiple of save_interval ({self.save_interval})")
        return self
