"""What two ranks run under the finite guard: rank 1 alone gets a NaN, in the third step, and both stop before it."""

from __future__ import annotations

import sys
from pathlib import Path

from paddledsv4.host import prepare_host

prepare_host(bitwise=True)

from layouts import groups_of, trainer  # noqa: E402
from observe.planted import plant  # noqa: E402

from paddledsv4.config import CheckpointConfig, ParallelConfig  # noqa: E402
from paddledsv4.config.observe import ObserveConfig  # noqa: E402
from paddledsv4.distributed.connect import connect  # noqa: E402
from paddledsv4.distributed.group import Groups  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.observe.losses import NotFinite  # noqa: E402
from paddledsv4.observe.run import observing  # noqa: E402
from paddledsv4.training.checkpoint.run import checkpointing  # noqa: E402

EXPERTS = ParallelConfig(world_size=2, data=2, expert=2)
TENSOR = ParallelConfig(world_size=2, tensor=2)
OP = "decoder.layers.0.self_attention.core_attention", "sparse_attention", 6


def run(groups: Groups, parallel: ParallelConfig, direction: str, check: str, folder: Path) -> None:
    saving = CheckpointConfig.from_dict({"dir": str(folder / "saved"), "save_interval": 1})
    runner = trainer("paddle", "fp32", groups, parallel, steps=4, gradient_accumulation_steps=2)
    if groups.world.rank == 1:
        plant(runner.model, *OP, direction)
    with (
        observing(runner, ObserveConfig(check_finite=check), folder),
        checkpointing(runner, saving) as (results, _),
    ):
        for _ in results:
            pass


def main(folder: Path) -> None:
    """The last error leaves the block, as in a real run; the others are printed."""
    with connect(EXPERTS) as groups:
        for name, own, parallel, direction in (
            ("experts", groups, EXPERTS, "forward"), ("tensor", groups_of(TENSOR, groups.world), TENSOR, "backward"),
        ):  # fmt: skip
            try:
                run(own, parallel, direction, "full", folder / name)
            except NotFinite as error:
                print(name, error)
        run(groups, EXPERTS, "forward", "loss", folder / "losses")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
