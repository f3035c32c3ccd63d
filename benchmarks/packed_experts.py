"""Frozen experts in MXFP4 beside the same experts unpacked: peak memory and time of a step that trains adapters.

256 experts of 98,304 parameters in each of two layers, 8 of them for each token. Each side runs in a process of its
own. Time is that of a step of 4096 tokens, 128 for an expert: CPU seconds, the fastest step, since other load only
adds. Memory is what Paddle had allocated at its peak in a step of 64 tokens, in which experts dominate, weights
included, and on top what numpy and Python had at theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.table import Table

from benchmarks.tell import run, tell

EXAMPLES = """Examples:

    python benchmarks/packed_experts.py

    python benchmarks/packed_experts.py --tokens 1024 --repeat 2
"""
ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0, "num_attention_heads": 4, "compress_ratios": [0, 4], "num_hash_layers": 0,
    "n_routed_experts": 256, "num_experts_per_tok": 8,
}  # fmt: skip
ATTENTION = ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_proj", "linear_proj"]
SEQUENCE = 64


def measure(experts: str, precision: str, tokens: int, repeat: int, everywhere: bool) -> dict[str, float]:
    """What one side takes, in this process. ``everywhere``: adapters on the experts too."""
    from paddledsv4.host import prepare_host

    prepare_host(bitwise=True)
    import numpy as np
    import paddle

    from paddledsv4.config import LoraConfig, ModelConfig, TrainConfig
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.training.trainer import Trainer

    model = ModelConfig.from_file(ROOT / "align" / "data" / "tiny-fp32").replace(**SHAPE)
    train = TrainConfig(
        precision=precision, sequence_length=SEQUENCE, micro_batch_size=tokens // SEQUENCE, steps=repeat,
        expert_weight_format=experts, optimizer={"lr": 1e-4},
    )
    rows = np.random.default_rng(0).integers(0, model.vocab_size, (64, SEQUENCE + 1))
    lora = LoraConfig(r=4) if everywhere else LoraConfig(r=4, target_modules=ATTENTION)
    trainer = Trainer(model, train, Policy.preset("paddle"), rows, lora=lora)
    memory = paddle.base.core
    resident = memory.host_memory_stat_current_value("Allocated", 0)
    memory.host_memory_stat_reset_peak_value("Allocated", 0)
    seconds, losses = [], []
    if repeat == 1:  # it is slow
        tracemalloc.start()
    for _ in range(repeat):
        start = time.process_time()
        losses.append(next(trainer.train(trainer.optimizer.step_count + 1)).losses[0].main)
        seconds.append(time.process_time() - start)
    peak = memory.host_memory_stat_peak_value("Allocated", 0) + tracemalloc.get_traced_memory()[1]
    return {"resident": resident, "peak": peak, "seconds": min(seconds), "loss": losses[-1]}


def worker(*arguments: object) -> dict[str, float]:
    """:func:`measure` in a process of its own.

    Raises:
        RuntimeError: it failed; the last line that it wrote.
    """
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.packed_experts", "--worker", json.dumps(arguments)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def figures(tokens: int, repeat: int) -> list[dict]:
    """Both sides, of every precision and choice of adapters."""
    rows = []
    for precision in ("fp32", "bf16"):
        for everywhere in (False, True):
            sides = {}
            for side in ("precision", "mxfp4"):
                timed = worker(side, precision, tokens, repeat, everywhere)
                sides[side] = worker(side, precision, SEQUENCE, 1, everywhere) | {"seconds": timed["seconds"]}
            rows.append({"dtype": precision, "adapters": "all" if everywhere else "attention", **sides})
    return rows


def table_of(rows: list[dict], tokens: int) -> Table:
    """For people."""
    columns = ("experts", "adapters on", "resident MB", "peak MB", "peak ratio", "step CPU s", "step ratio")
    table = Table(*columns, title=f"512 experts; memory of {SEQUENCE} tokens, time of {tokens:,}")
    for row in rows:
        whole, packed = row["precision"], row["mxfp4"]
        for name, side in ((row["dtype"], whole), ("mxfp4", packed)):
            ratio = [f"{side[key] / whole[key]:.2f}" if side is packed else "" for key in ("peak", "seconds")]
            sizes = [f"{side[key] / 1e6:.0f}" for key in ("resident", "peak")]
            table.add_row(name, row["adapters"], *sizes, ratio[0], f"{side['seconds']:.2f}", ratio[1],
                          end_section=side is packed)  # fmt: skip
    return table


def main(
    tokens: Annotated[int, typer.Option(min=SEQUENCE, help="Tokens of a step, a multiple of 64.")] = 4096,
    repeat: Annotated[int, typer.Option(min=1, help="Steps; the fastest counts.")] = 4,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    rows = figures(tokens, repeat)
    tell(table_of(rows, tokens), rows, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        run(main, __doc__, EXAMPLES)
