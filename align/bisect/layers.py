"""Which layers call which op."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from align.bisect.trial import Trial
from paddledsv4.numerics.policy import Policy


class CallingLayers:
    """Stands in for a policy, and notes the layer of every call of an op, while the model is built and after."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls: dict[str, dict[str, None]] = {}  # op -> layers in the order of their first calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def ops(self, path: str = "", emulate_bfloat16: bool = False) -> SimpleNamespace:
        """The policy's own functions; they note where they are called from."""
        chosen = vars(self.policy.ops(path, emulate_bfloat16))
        return SimpleNamespace(**{op: self._noting(op, layer_of(path), function) for op, function in chosen.items()})

    def _noting(self, op: str, layer: str, function: Any) -> Any:
        def call(*args, **kwargs):
            self.calls.setdefault(op, {})[layer] = None
            return function(*args, **kwargs)

        return call


def layer_of(path: str) -> str:
    """The numbered layer that ``path`` belongs to; a path without one stands for itself."""
    found = re.match(r"(?:[^.]+\.)*?layers\.\d+(?=\.|$)", path)
    return found[0] if found else path


def calling_layers(trial: Trial, policy: Policy) -> dict[str, list[str]]:
    """op -> the layers that call it in one step, "" for the model itself."""
    watching = CallingLayers(policy)
    next(iter(trial.trainer(watching).train(steps=1)))
    return {op: list(layers) for op, layers in watching.calls.items()}
