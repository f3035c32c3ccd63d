"""What is looked at while a run goes on. None of it changes a number."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.metrics import MetricsConfig
from paddledsv4.config.profile import ProfileConfig
from paddledsv4.config.steps import spans_in
from paddledsv4.errors import UserError

CheckFinite = Literal["off", "loss", "full"]


def _checked(text: str) -> str:
    if spans_in(text) is None:
        raise UserError(f"{text!r}: must be steps from 1 on and spans of them with commas, such as 1,5:8")
    return text


class AttentionTraceConfig(StrictConfig):
    """Which attention internals are recorded: ``layers`` is a glob over the paths of layers, as in ``numerics.layers``,
    ``steps`` a list such as "1,5:8".
    """

    SECTION: ClassVar[str] = "observe.trace_attention."

    layers: str = "*"
    steps: Annotated[str, AfterValidator(_checked)] = "1"

    def wants(self, step: int) -> bool:
        """Whether ``step`` is recorded."""
        return any(first <= step <= last for first, last in spans_in(self.steps))


class ObserveConfig(StrictConfig):
    """``check_finite``: ``loss`` stops the run when a loss or a gradient norm is not finite; ``full`` looks at every
    result of every op as well, forward and backward, and names the first that is not; ``off`` trains on.
    """

    SECTION: ClassVar[str] = "observe."

    check_finite: CheckFinite = "loss"
    trace_attention: AttentionTraceConfig | None = None
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values):
        """yaml reads a bare off as false."""
        if isinstance(values, dict) and values.get("check_finite") is False:
            return values | {"check_finite": "off"}
        return values

    def changed(self, check_finite: str | None, layers: str | None, steps: str | None) -> Self:
        """With the command line's --check-finite, --trace-attention and --trace-steps.

        Raises:
            UserError: --trace-steps without anything to trace, or no list of steps.
        """
        trace = self.trace_attention
        if steps is not None and layers is None and trace is None:
            raise UserError("--trace-steps goes with --trace-attention: name the layers to trace, such as '*'")
        given = {name: value for name, value in (("layers", layers), ("steps", steps)) if value is not None}
        if given:
            trace = (trace or AttentionTraceConfig()).replace(**given)
        return self.model_copy(update={"trace_attention": trace, "check_finite": check_finite or self.check_finite})
