"""What the ranks run: ``jobs.py checks FILE`` runs every check for this number of ranks, the others fail on purpose.

A check returns nothing or why it was skipped, or raises; the outcome of each goes to FILE.RANK as JSON.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from paddledsv4.host import prepare_host

prepare_host(bitwise=True)

import context_checks  # noqa: E402
import numpy as np  # noqa: E402
import paddle  # noqa: E402
import tensor_checks  # noqa: E402
from layouts import on_many, on_one_card, seen, trainer  # noqa: E402

from paddledsv4.config import ParallelConfig  # noqa: E402
from paddledsv4.distributed import collectives  # noqa: E402
from paddledsv4.distributed.connect import connect  # noqa: E402
from paddledsv4.distributed.group import Group, Groups  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.moe.dispatcher import AllToAllDispatcher  # noqa: E402
from paddledsv4.training import optimizer, step  # noqa: E402
from paddledsv4.training.gradients import MainGradients  # noqa: E402

RANKS = int(os.environ["PADDLE_TRAINERS_NUM"])
LAYOUT = ParallelConfig(world_size=RANKS, data=RANKS, expert=2)


def numbers(rank: int, *shape: int, dtype="float32") -> paddle.Tensor:
    """Whole numbers, which sum exactly, different on every rank."""
    return paddle.to_tensor(np.random.default_rng(rank).integers(-99, 99, shape), dtype)


def equal(ours, expected) -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


# ---- collectives ---------------------------------------------------------------------------------------------------


def check_all_reduce(groups: Groups) -> None:
    for dtype in ("float32", "float64", "int64"):
        everyone = np.stack([numbers(r, 3, 5, dtype=dtype).numpy() for r in range(RANKS)])
        mine = numbers(groups.world.rank, 3, 5, dtype=dtype)
        equal(groups.world.all_reduce_(mine.clone()), everyone.sum(0))
        equal(groups.world.all_reduce_(mine.clone(), "max"), everyone.max(0))
    part = numbers(9, 4, 6)
    try:
        groups.world.all_reduce_(part[:, :3].transpose([1, 0]))
    except ValueError:
        return
    raise AssertionError("a tensor that is not contiguous was reduced, but not in place")


def check_gather_scatter_broadcast(groups: Groups) -> None:
    rank, size = groups.world.rank, RANKS
    everyone = [numbers(r, size, 4).numpy() for r in range(size)]
    equal(groups.world.all_gather(numbers(rank, size, 4)), np.concatenate(everyone))
    equal(groups.world.reduce_scatter(numbers(rank, size, 4)), sum(everyone)[rank : rank + 1])
    equal(groups.world.broadcast_(numbers(rank, size, 4), source=1), everyone[1])


def check_all_to_all_is_uneven(groups: Groups) -> None:
    """Rank r sends (r + d) % 3 rows to rank d: some get none. The gradient goes the same way back."""
    rank = groups.world.rank
    sizes = [[(r + d) % 3 for d in range(RANKS)] for r in range(RANKS)]
    send, receive = sizes[rank], [sizes[r][rank] for r in range(RANKS)]

    def sent(r: int, d: int) -> np.ndarray:
        start = sum(sizes[r][:d])
        return numbers(r, sum(sizes[r]), 2).numpy()[start : start + sizes[r][d]]

    x = numbers(rank, sum(send), 2)
    x.stop_gradient = False
    y = collectives.all_to_all(x, group=groups.world, send=send, receive=receive)
    equal(y.detach(), np.concatenate([sent(r, rank) for r in range(RANKS)]))
    (y * y).sum().backward()
    equal(x.grad, 2 * x.numpy())


def check_gradients(groups: Groups) -> None:
    """The loss is the sum over ranks of weight_r * output_r; every collective's gradient in float64."""
    group, rank = groups.world, groups.world.rank
    weights = [numbers(50 + r, RANKS, dtype="float64").numpy() for r in range(RANKS)]

    def gradient(function, rows: int, outputs: int) -> np.ndarray:
        x = numbers(rank, rows, dtype="float64")
        x.stop_gradient = False
        (function(x, group=group) * paddle.to_tensor(weights[rank][:outputs])).sum().backward()
        return x.grad.numpy()

    total = sum(weights)
    equal(gradient(collectives.all_reduce, RANKS, RANKS), total)
    equal(gradient(collectives.all_gather, 1, RANKS), total[rank : rank + 1])
    equal(gradient(collectives.reduce_scatter, RANKS, 1), [w[0] for w in weights])
    equal(gradient(collectives.broadcast, RANKS, RANKS), total * (rank == 0))


def check_groups(groups: Groups) -> None:
    """Expert groups are neighbours; expert-data groups hold the ranks with the same experts."""
    rank = groups.world.rank
    assert groups.expert.ranks == (rank // 2 * 2, rank // 2 * 2 + 1) and groups.expert.rank == rank % 2
    assert groups.expert_data.ranks == tuple(range(rank % 2, RANKS, 2))
    ours = groups.expert_data.all_gather(paddle.to_tensor([rank]))
    equal(ours, groups.expert_data.ranks)


# ---- training ------------------------------------------------------------------------------------------------------


def without_experts(groups: Groups) -> tuple[Groups, ParallelConfig]:
    """The same ranks, data parallel only."""
    alone = Group("expert", (groups.world.rank,))
    return replace(groups, expert=alone, expert_data=groups.world), LAYOUT.replace(expert=1)


def check_data_parallel_has_the_bits_of_accumulation(groups: Groups) -> str | None:
    """Two ranks or two microbatches: a sum of two terms and factors that are powers of two."""
    if RANKS > 2:
        return "skipped: the sum of more than two terms has an order"
    for preset in ("paddle", "megatron"):
        one, many = on_one_card(2, preset, "fp32", RANKS), on_many(2, preset, "fp32", *without_experts(groups))
        assert one.losses == many.losses and one.norms == many.norms
        for name, value in one.state.items():
            assert value.tobytes() == many.state[name].tobytes(), name


def check_the_references_indexer_scale_depends_on_the_layout(groups: Groups) -> None:
    """With indexer_loss_scale=megatron the indexer's gradient is a sum over microbatches but a mean over ranks."""
    scale = {"indexer_loss_scale": "megatron"}
    one = on_one_card(1, "paddle", "fp64", RANKS, **scale)
    many = on_many(1, "paddle", "fp64", *without_experts(groups), **scale)
    far = {name for name, value in one.state.items() if not np.allclose(value, many.state[name], 0, 1e-9)}
    assert far and all("indexer" in name for name in far), far


def check_expert_parallel_is_the_same_model(groups: Groups) -> None:
    """In float64 the layout changes the last digits only: losses, norms, every weight and bias of this rank."""
    one = on_one_card(3, "paddle", "fp64", RANKS)
    many = on_many(3, "paddle", "fp64", groups, LAYOUT)
    np.testing.assert_allclose(many.losses, one.losses, 1e-12)
    np.testing.assert_allclose(many.norms, one.norms, 1e-11)
    assert set(many.state) < set(one.state) and any("local_experts" in name for name in many.state)
    for name, value in many.state.items():
        np.testing.assert_allclose(value, one.state[name], 1e-8, 1e-10, err_msg=name)


PLANTS = {
    "gradients summed instead of averaged": (MainGradients, "average", lambda self: sum_only(self)),
    "rows not regrouped by expert": (AllToAllDispatcher, "_transpose", lambda self, rows, sizes: rows),
    "every rank's own token counts": (step, "sum_token_counts", lambda routers, group: None),
    "norm of this rank's experts only": (optimizer, "total_norm", lambda groups, norms, dtype: math.hypot(*norms)),
}


def sum_only(gradients: MainGradients) -> None:
    for buffer, group in gradients.buffers:
        group.all_reduce_(buffer)


def check_planted_bugs_are_seen(groups: Groups) -> None:
    for bug, plant in PLANTS.items():
        seen(bug, mock.patch.object(*plant), lambda: check_expert_parallel_is_the_same_model(groups))


def check_other_weights_are_refused_everywhere(groups: Groups) -> None:
    runner = trainer("paddle", "fp32", groups, LAYOUT)
    if groups.world.rank == 1:
        head = runner.model.output_layer.weight
        paddle.assign(head + 1e-7, head)
    refused("the weights of rank 1 differs from that of rank 0", runner.check_ranks)


def check_another_configuration_is_refused_everywhere(groups: Groups) -> None:
    clip = 1.0 + (groups.world.rank == 1)
    refused(
        "the training section of rank 1 differs",
        lambda: trainer("paddle", "fp32", groups, LAYOUT, clip_grad_norm=clip),
    )


def refused(says: str, function: Callable) -> None:
    try:
        function()
    except UserError as error:
        assert says in str(error), error
        return
    raise AssertionError("nothing was refused")


EVERYWHERE = globals() | vars(context_checks) | vars(tensor_checks)
CHECKS = {name: function for name, function in EVERYWHERE.items() if name.startswith("check_")}


def checks(groups: Groups, file: str) -> None:
    outcome = {}
    for name, function in CHECKS.items():
        start = time.monotonic()
        try:
            outcome[name] = function(groups) or "ok"
        except Exception:
            outcome[name] = traceback.format_exc()
        print(name, f"{time.monotonic() - start:.1f} s", flush=True)
    Path(f"{file}.{groups.world.rank}").write_text(json.dumps(outcome))


# ---- ranks that fail -----------------------------------------------------------------------------------------------


def killed(groups: Groups, file: str) -> None:
    """Rank 1 is killed between two steps."""
    for result in trainer("paddle", "fp32", groups, LAYOUT).train(9):
        if groups.world.rank == 1 and result.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def hanging(groups: Groups, file: str) -> None:
    """Rank 1 comes to nothing."""
    if groups.world.rank == 1:
        time.sleep(20)
        return
    groups.world.barrier()


def failing(groups: Groups, file: str) -> None:
    """Rank 1 refuses to go on."""
    if groups.world.rank == 1:
        raise UserError("this disk is full")
    groups.world.barrier()


def main() -> None:
    job, *rest = sys.argv[1:]
    layout = LAYOUT.replace(timeout=6) if job == "hanging" else LAYOUT
    try:
        with connect(layout) as groups:
            globals()[job](groups, rest[0] if rest else "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
