"""One rank of benchmarks/parallel.py: trains a few steps and leaves seconds and bytes as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from paddledsv4.host import prepare_host

prepare_host()

from align.bundle import load_bundle  # noqa: E402
from benchmarks.traffic import counted  # noqa: E402
from paddledsv4.config import ParallelConfig  # noqa: E402
from paddledsv4.distributed.connect import connect  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.training.trainer import Trainer  # noqa: E402

WARM_UP = 1


def main(bundle: str, parallel: str, steps: int, file: str) -> None:
    """Steps of one global batch of four sequences, however many ranks share it."""
    recorded, layout = load_bundle(bundle), ParallelConfig.model_validate_json(parallel)
    train = recorded.training.replace(micro_batch_size=1, gradient_accumulation_steps=4 // layout.data)
    sent: Counter = Counter()
    with connect(layout) as groups:
        trainer = Trainer(
            recorded.model, train, Policy.preset("paddle"), recorded.tokens, recorded.init(),
            parallel=layout, groups=counted(groups, sent),
        )
        results, seconds = trainer.train(WARM_UP + steps), []
        for index in range(WARM_UP + steps):
            if index == WARM_UP:
                sent.clear()
            start = time.perf_counter()
            result = next(results)
            seconds.append(time.perf_counter() - start)
        outcome = {
            "seconds": seconds[WARM_UP:], "tokens": 4 * train.sequence_length, "loss": result.losses[-1].main,
            "sent": [[kind, operation, size / steps] for (kind, operation), size in sorted(sent.items())],
        }
        Path(f"{file}.{groups.world.rank}").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
