"""What the ranks run: ``jobs.py checks FILE`` runs every check for this number of ranks, the others fail on purpose.

A check returns nothing or why it was skipped, or raises; the outcome of each goes to FILE.RANK as JSON.
"""

from __future__ import annotations

import errno
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
import lora_checks  # noqa: E402
import metrics_checks  # noqa: E402
import numpy as np  # noqa: E402
import paddle  # noqa: E402
import tensor_checks  # noqa: E402
from layouts import on_many, on_one_card, seen, trainer  # noqa: E402

from paddledsv4.config import CheckpointConfig, ParallelConfig  # noqa: E402
from paddledsv4.distributed import collectives  # noqa: E402
from paddledsv4.distributed.connect import connect  # noqa: E402
from paddledsv4.distributed.group import ALONE, Group, Groups  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.moe.dispatcher import AllToAllDispatcher  # noqa: E402
from paddledsv4.training import optimizer, step  # noqa: E402
from paddledsv4.training.checkpoint import shard  # noqa: E402
from paddledsv4.training.checkpoint.run import checkpointing  # noqa: E402
from paddledsv4.training.checkpoint.save import Checkpoints  # noqa: E402
from paddledsv4.training.checkpoint.state import host_array, state  # noqa: E402
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


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def go_on(runner, source: str | None = None, **saving) -> tuple[list, list[str]]:
    """Train to the end. Returns [losses, norm] of every step, and the notes."""
    with checkpointing(runner, CheckpointConfig.from_dict(saving), source) as (results, notes):
        return [[[(loss.main, loss.mtp) for loss in r.losses], r.grad_norm] for r in results], notes


def saved(name: str, precision: str, groups: Groups, parallel: ParallelConfig) -> tuple[str, list, dict[str, bytes]]:
    """A checkpoint after the first of two steps, what the second step gave, and the state after it."""
    folder = f"{sys.argv[2]}.{name}"
    runner = trainer("paddle", precision, groups, parallel, steps=2, gradient_accumulation_steps=1)
    steps, _ = go_on(runner, dir=folder, save_interval=1, **{"async": True})
    return f"{folder}/iter_0000001", steps[1], state_bytes(runner)


def resumed(source: str, precision: str, groups=ALONE, parallel: ParallelConfig | None = None, steps: int = 2):
    """A trainer that went on from the checkpoint to step ``steps``, its last step, and its last note."""
    accumulation = RANKS if groups is ALONE else 1
    runner = trainer("paddle", precision, groups, parallel, steps=steps, gradient_accumulation_steps=accumulation)
    made, notes = go_on(runner, source)
    return runner, made[-1] if made else None, notes


def state_bytes(runner) -> dict[str, bytes]:
    return {piece.name: host_array(tensor).tobytes() for piece, tensor in state(runner)}


def check_ranks_resume_bit_for_bit(groups: Groups) -> None:
    """Every rank wrote what it alone owns, and the second half has the bits of the whole."""
    source, last, whole = saved("same", "fp32", groups, LAYOUT)
    names = [{entry["name"] for entry in json.loads(file.read_text())["tensors"]}
             for file in sorted(Path(source).glob("rank_*.json"))]
    assert len(names) == RANKS and sum(map(len, names)) == len(set.union(*names)) and not any(names[2:])
    assert names[1] and all("local_experts" in name for name in names[1])
    runner, again, notes = resumed(source, "fp32", groups, LAYOUT)
    assert again == last and state_bytes(runner) == whole
    assert len(notes) == 1 and notes[0].startswith("resumed after step 1"), notes


def check_data_parallel_goes_on_as_accumulation(groups: Groups) -> str | None:
    """Two ranks become two accumulation steps, bit for bit, and say so."""
    if RANKS > 2:
        return "skipped: the sum of more than two terms has an order"
    for precision in ("fp32", "bf16"):
        source, last, whole = saved(f"data-{precision}", precision, *without_experts(groups))
        runner, again, notes = resumed(source, precision)
        assert again == [last[0], last[1]] and state_bytes(runner) == whole
        assert notes[1:] == ["another layout (data 2 -> 1, accumulation 1 -> 2): goes on bit for bit"], notes


def check_other_layouts_take_the_state_and_say_what_differs(groups: Groups) -> None:
    """ep2 -> ep1 -> ep2: the state moves bit for bit; the sums of the next step differ in their last digits."""
    source, last, _ = saved("spread", "fp64", groups, LAYOUT)
    runner, _, notes = resumed(source, "fp64", steps=1)
    mine, _, _ = resumed(source, "fp64", groups, LAYOUT, steps=1)
    ours, whole = state_bytes(mine), state_bytes(runner)
    assert ours.items() < whole.items()
    why = "not bit for bit: expert 2 and 1 add in different orders"
    changes = f"data {RANKS} -> 1, expert 2 -> 1, accumulation 1 -> {RANKS}"
    assert f"another layout ({changes}): {why}" in notes, notes
    _, one, _ = resumed(source, "fp64")
    np.testing.assert_allclose(one[0], last[0], 1e-12)
    np.testing.assert_allclose(one[1], last[1], 1e-11)
    back = f"{sys.argv[2]}.back.{groups.world.rank}"
    with Checkpoints(CheckpointConfig(dir=back, save_interval=1), ALONE) as checkpoints:
        checkpoints.save(runner, background=False)
    groups.world.barrier()
    again, _, _ = resumed(f"{sys.argv[2]}.back.0", "fp64", groups, LAYOUT, steps=1)
    assert state_bytes(again) == ours


def refused(says: str, function: Callable) -> None:
    try:
        function()
    except UserError as error:
        assert says in str(error), error
        return
    raise AssertionError("nothing was refused")


EVERYWHERE = globals() | vars(context_checks) | vars(lora_checks) | vars(metrics_checks) | vars(tensor_checks)
CHECKS = {name: function for name, function in EVERYWHERE.items() if name.startswith("check_")}


def checks(groups: Groups, file: str, *names: str) -> None:
    outcome = {}
    for name in names:
        start = time.monotonic()
        try:
            outcome[name] = CHECKS[name](groups) or "ok"
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
        time.sleep(12)
        return
    groups.world.barrier()


def failing(groups: Groups, file: str) -> None:
    """Rank 1 refuses to go on."""
    if groups.world.rank == 1:
        raise UserError("this disk is full")
    groups.world.barrier()


def saving(groups: Groups, file: str) -> None:
    """Rank 1 is killed, or its disk is full, while the second checkpoint is written."""
    write, kill = shard.write, file.endswith("killed")

    def failing_write(path: Path, *rest):
        if groups.world.rank == 1 and "0000002" in str(path):
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *rest)

    shard.write = failing_write
    runner = trainer("paddle", "fp32", groups, LAYOUT, steps=3, gradient_accumulation_steps=1)
    go_on(runner, dir=file, save_interval=1)


def main() -> None:
    job, *rest = sys.argv[1:]
    layout = LAYOUT.replace(timeout=6) if job == "hanging" else LAYOUT
    try:
        with connect(layout) as groups:
            globals()[job](groups, *(rest or [""]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
