"""Peak memory and time of head and loss as two ops and as one, forward and backward, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY = 129280
KINDS = ("two ops", "linear_cross_entropy")


def measure(kind: str, tokens: int, width: int) -> dict[str, float]:
    """Bytes beyond the inputs at the peak, and seconds, of one forward and backward in float32."""
    from paddledsv4.host import prepare_host

    prepare_host()
    import paddle

    from paddledsv4.fusions.linear_cross_entropy import linear_cross_entropy
    from paddledsv4.numerics.registry import load_all

    paddle.seed(0)
    ops = load_all()
    hidden, weight = paddle.randn([tokens, 1, width]), paddle.randn([VOCABULARY, width]) * 0.1
    labels = paddle.randint(0, VOCABULARY, [1, tokens])
    hidden.stop_gradient = weight.stop_gradient = False
    if kind == "two ops":
        linear, loss = (ops[op].variants["paddle"].function for op in ("linear", "cross_entropy"))
        losses = lambda: loss(linear(hidden, weight), labels)  # noqa: E731
    else:
        losses = lambda: linear_cross_entropy.variants["paddle"].function(hidden, weight, labels)  # noqa: E731
    stat = paddle.base.core
    stat.host_memory_stat_reset_peak_value("Allocated", 0)
    before, start = stat.host_memory_stat_current_value("Allocated", 0), time.perf_counter()
    mean = losses().mean()
    mean.backward()
    seconds = time.perf_counter() - start
    peak = stat.host_memory_stat_peak_value("Allocated", 0) - before
    return {"kind": kind, "tokens": tokens, "width": width, "logits_bytes": 4 * tokens * VOCABULARY, "peak_bytes": peak,
            "seconds": seconds, "loss": float(mean)}  # fmt: skip


def figures(tokens: int, width: int) -> list[dict[str, float]]:
    """Both kinds."""
    root = Path(__file__).resolve().parents[1]
    found = []
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.head_loss", kind, str(tokens), str(width)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
