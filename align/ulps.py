"""How far two sets of kernels are apart, op by op, on the real numbers of one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from align.bundle import Bundle
from align.calls import Call, CallRecorder, replay
from align.ulp import ulp_distance
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.data import batches
from paddledsv4.training.step import train_step
from paddledsv4.training.trainer import Trainer


@dataclass
class Distance:
    """Elements compared, how many are equal, and how many units in the last place the others are apart.

    ``scaled`` is the largest difference in units of the last place of its tensor's largest element: where sums
    cancel, a result near zero is many of its own units away and means little.
    """

    elements: int = 0
    equal: int = 0
    max: float = 0.0
    total: float = 0.0
    scaled: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(self.elements, 1)

    def add(self, ours: Any, theirs: Any) -> None:
        """Compare two results of one call: tensors, numbers, or None for no gradient.

        A NaN on either side is infinitely far; None compares as zeros.
        """
        if ours is None and theirs is None:
            return
        left, right = _numbers(ours, theirs), _numbers(theirs, ours)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        self.elements += left.size
        self.equal += int(same.sum())
        if left.dtype.kind != "f" or same.all():
            return
        unit = 2.0**16 if _is_bfloat16(ours) else 1.0
        steps = np.where(same, 0.0, ulp_distance(left, right)) / unit
        steps = np.where(np.isnan(steps), np.inf, steps)
        self.max = max(self.max, float(steps.max()))
        self.total += float(steps.sum())
        finite = np.isfinite(left) & np.isfinite(right)
        last_place = np.spacing(np.abs(right[finite]).max(initial=0.0)) * unit
        largest = np.abs(left[finite].astype(np.float64) - right[finite]).max(initial=0.0)
        self.scaled = max(self.scaled, float(largest / last_place))


@dataclass
class OpDistance:
    """Both directions of one op; ``calls`` of it were compared."""

    forward: Distance
    backward: Distance
    calls: int = 0


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == paddle.bfloat16


def _numbers(x: Any, other: Any) -> np.ndarray:
    if x is None:
        return np.zeros_like(_numbers(other, other))
    array = (x.astype("float32") if _is_bfloat16(x) else x).numpy() if isinstance(x, Tensor) else np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def record_step(bundle: Bundle, policy: Policy, ops: set[str] | None = None) -> list[Call]:
    """Every call of an op in the first microbatch of the bundle's first step and in the update that follows."""
    train = bundle.training.replace(gradient_accumulation_steps=1)
    trainer = Trainer(bundle.model, train, policy, bundle.tokens, bundle.init())
    with CallRecorder(trainer.model, ops) as recorder:
        train_step(
            trainer.model, trainer.optimizer, train, 1,
            lambda index: batches(bundle.tokens, 0, index, 0, bundle.training, trainer.parallel),
            train.optimizer.lr,
        )
    return recorder.calls


def measure(calls: list[Call], ours: Policy, theirs: Policy) -> dict[str, OpDistance]:
    """op -> distance between the variants that the two policies choose, on the recorded calls."""
    result: dict[str, OpDistance] = {}
    for call in calls:
        here, there = (getattr(policy.ops(call.path), call.op) for policy in (ours, theirs))
        distance = result.setdefault(call.op, OpDistance(Distance(), Distance()))
        distance.calls += 1
        for side, left, right in zip(
            (distance.forward, distance.backward), replay(call, here), replay(call, there), strict=True
        ):
            for a, b in zip(left, right, strict=True):
                side.add(a, b)
    return dict(sorted(result.items()))
