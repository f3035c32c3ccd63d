"""The shipped measurement of how far Paddle's kernels are from torch's, op by op. ``align ulps --write`` makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddledsv4.numerics.policy import Policy

FILE = Path(__file__).with_name("ulps.json")


def measured() -> dict[str, Any]:
    """{"made_with": {..., "summary": text}, "ops": {op: {"forward": side, "backward": side}}}.

    A side is None where there is nothing to compare, else {"elements", "equal" (a fraction), "max", "mean",
    "scaled"}: units in the last place between variants ``megatron`` and ``torch`` on the same numbers.
    """
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"made_with": {}, "ops": {}}


def short(value: float | None) -> str:
    """Two digits: 0, 0.013, 2.6, 4.1e+04; "-" where there is nothing to measure."""
    return "-" if value is None else f"{value:.2g}"


def both(sides: dict[str, Any], figure: str) -> str:
    """"forward / backward" of one figure."""
    return " / ".join(short(side and side[figure]) for side in (sides["forward"], sides["backward"]))


def notes(policy: Policy) -> list[str]:
    """For a report: how far the kernels of the ops that run as ``megatron`` are from torch's. Needs no torch."""
    shipped = measured()
    ours = {op: shipped["ops"][op] for op, v in policy.describe().items() if v == "megatron" and op in shipped["ops"]}
    if not ours:
        return []
    distant = [op for op, sides in ours.items() if any(side and side["max"] for side in sides.values())]
    lines = [
        f"{op}: {both(ours[op], 'mean')} ULP from torch's kernels on average, {both(ours[op], 'max')} at most"
        for op in distant
    ]
    equal = [op for op in ours if op not in distant]
    made = shipped["made_with"]["summary"]
    return [
        f"distance of Paddle's kernels from torch's, forward / backward, measured with {made}",
        *lines,
        f"equal to torch's kernels: {', '.join(equal)}",
    ]
