"""Memory of a process, in MiB."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from paddledsv4.observe.metrics.gauge import Gauge, reduced

STATUS = Path("/proc/self/status")
MIB = 1 << 20


def host_memory() -> tuple[float, float]:
    """Resident memory now, NaN where the system does not tell, and the highest it has been."""
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        now, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    unit = MIB if sys.platform == "darwin" else 1024
    return float("nan"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_memory() -> tuple[float, float] | None:
    """What Paddle has allocated on the device now and at most; None where it computes on the host."""
    if not (paddle.device.is_compiled_with_cuda() and paddle.device.get_device().startswith("gpu")):
        return None
    return paddle.device.cuda.memory_allocated() / MIB, paddle.device.cuda.max_memory_allocated() / MIB


class Memory(Gauge):
    """Of the rank that has most of it."""

    layer = nn.Layer

    def watches(self, layer: nn.Layer) -> bool:
        return False

    def values(self) -> dict[str, float]:
        here = {"host": host_memory()} | ({"device": device} if (device := device_memory()) else {})
        most = reduced(self.groups.world, {name: np.array(numbers) for name, numbers in here.items()}, "max")
        return {
            f"memory/{name}_{which}_mib": float(x)
            for name, numbers in most.items() for which, x in zip(("now", "peak"), numbers, strict=True)
        }
