"""How far two sets of kernels are apart, op by op, on the real numbers of one training step."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from rich.table import Table

from align.bundle import Bundle
from align.calls import CallRecorder
from align.ulp import ulp_distance
from paddledsv4.host import BITWISE_ENVIRONMENT
from paddledsv4.numerics.bfloat16 import needs_emulation
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.ulps import FILE, short
from paddledsv4.observe.replay import Call, replay
from paddledsv4.training.data import batches
from paddledsv4.training.step import train_step
from paddledsv4.training.trainer import Trainer


@dataclass
class Distance:
    """Elements compared, how many are equal, and how many units in the last place the others are apart.

    ``largest`` is the largest difference, and ``scaled`` that in units of the last place of its tensor's largest
    element: where sums cancel, a result near zero is many of its own units away and means little. A NaN equals
    nothing, not even a NaN, and is infinitely far.
    """

    elements: int = 0
    equal: int = 0
    max: float = 0.0
    total: float = 0.0
    scaled: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(self.elements, 1)

    def to_dict(self) -> dict[str, float] | None:
        """The figures with four digits, ``equal`` as a fraction; None when nothing was compared."""
        if not self.elements:
            return None
        figures = {"equal": self.equal / self.elements, "max": self.max, "mean": self.mean, "scaled": self.scaled}
        return {"elements": self.elements, **{name: float(f"{value:.4g}") for name, value in figures.items()}}

    def add(self, ours: Any, theirs: Any) -> None:
        """Compare two results of one call: tensors, numbers, or None for no gradient, which compares as zeros."""
        if ours is None and theirs is None:
            return
        left, right = _numbers(ours, theirs), _numbers(theirs, ours)
        same = left == right
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
        if not finite[~same].all():
            self.scaled = self.largest = np.inf
            return
        last_place = np.spacing(np.abs(right[finite]).max(initial=0.0)) * unit
        largest = np.abs(left[finite].astype(np.float64) - right[finite]).max(initial=0.0)
        self.largest = max(self.largest, float(largest))
        self.scaled = max(self.scaled, float(largest / last_place))


@dataclass
class OpDistance:
    """Both directions of one op; ``calls`` of it were compared."""

    forward: Distance = field(default_factory=Distance)
    backward: Distance = field(default_factory=Distance)
    calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"forward": self.forward.to_dict(), "backward": self.backward.to_dict()}


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


def measure(calls: list[Call], ours: Policy, theirs: Policy, dtype: str = "float32") -> dict[str, OpDistance]:
    """op -> distance between the variants that the two policies choose, on the recorded calls of a model in ``dtype``.
    """
    emulate = needs_emulation(dtype)
    result: dict[str, OpDistance] = {}
    for call in calls:
        here, there = (getattr(policy.ops(call.path, emulate), call.op) for policy in (ours, theirs))
        distance = result.setdefault(call.op, OpDistance())
        distance.calls += 1
        for side, left, right in zip(
            (distance.forward, distance.backward), replay(call, here), replay(call, there), strict=True
        ):
            for a, b in zip(left, right, strict=True):
                side.add(a, b)
    return dict(sorted(result.items()))


def made_with(bundle: Bundle) -> dict[str, Any]:
    """Versions, machine and environment of a measurement, and all of it in one line."""
    found = {"paddle": paddle.__version__, "torch": _torch_version(), "processor": _processor()}
    summary = f"paddle {found['paddle']}, torch {found['torch']}, {found['processor']}, {bundle.name} step 1"
    return {
        **found, "bundle": bundle.name, "step": 1, "microbatch": 0, "summary": summary,
        "environment": {name: os.environ.get(name) for name in BITWISE_ENVIRONMENT},
    }  # fmt: skip


def _torch_version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(distances: dict[str, OpDistance], bundle: Bundle) -> dict[str, Any]:
    """The measurement as it is shipped in paddledsv4/numerics/ulps.json."""
    return {"made_with": made_with(bundle), "ops": {op: d.to_dict() for op, d in distances.items()}}


def save(measurement: dict[str, Any]) -> None:
    """Make it the measurement that paddledsv4 ships, whole or not at all."""
    temporary = FILE.with_name(FILE.name + ".part")
    temporary.write_text(json.dumps(measurement, indent=1) + "\n", encoding="utf-8")
    temporary.replace(FILE)


def as_table(distances: dict[str, OpDistance], title: str) -> Table:
    """For a terminal: per op the fraction of equal elements, mean and largest distance in ULPs, both directions."""
    table = Table(title=title)
    table.add_column("op", no_wrap=True)
    for heading in ("calls", "equal", "mean", "max", "backward equal", "mean", "max"):
        table.add_column(heading, justify="right")
    for op, d in distances.items():
        cells = []
        for side in (d.forward, d.backward):
            equal = f"{side.equal / side.elements:.2%}" if side.elements else "-"
            cells += [equal, *(short(x if side.elements else None) for x in (side.mean, side.max))]
        table.add_row(op, str(d.calls), *cells)
    return table
