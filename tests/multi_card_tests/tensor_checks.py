"""Checks of tensor parallelism, which ``jobs.py checks`` runs with its own."""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import numpy as np
import paddle
from layouts import groups_of, on_many, on_one_card, seen, trainer

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed.gloo import GlooGroup
from paddledsv4.distributed.group import Groups
from paddledsv4.errors import UserError
from paddledsv4.moe import layer as moe_layer
from paddledsv4.moe.dispatcher import all_assignments
from paddledsv4.numerics.registry import load_all
from paddledsv4.tensor_parallel import mappings
from paddledsv4.tensor_parallel.cross_entropy import vocab_parallel
from paddledsv4.tensor_parallel.layers import GateAndLinear
from paddledsv4.tensor_parallel.region import WholeAtRest
from paddledsv4.training import gradients, optimizer
from paddledsv4.weights import shards
from paddledsv4.weights.load import named_tensors

RANKS = int(os.environ["PADDLE_TRAINERS_NUM"])


def layout(tensor: int = 2, **more) -> ParallelConfig:
    return ParallelConfig(world_size=RANKS, data=RANKS // tensor, tensor=tensor, **more)


def layouts() -> list[ParallelConfig]:
    """With and without slices at rest, data ranks, split experts and whole ones."""
    whole, sliced = layout(), layout(sequence_parallel=True)
    if RANKS == 2:
        return [whole, sliced, sliced.replace(expert=2, expert_tensor=1), whole.replace(expert_tensor=1)]
    return [whole, sliced.replace(expert=2), sliced.replace(expert=RANKS, expert_tensor=1), layout(4)]


# ---- mappings ------------------------------------------------------------------------------------------------------


def numbers(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    """Whole numbers, which sum exactly."""
    return np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype)


def check_mappings(groups: Groups) -> None:
    """Values and gradients, from the input and the output's gradient that every rank has."""
    group, rank, n = groups.world, groups.world.rank, RANKS
    whole = numbers(0, 2 * n, 3 * n)
    partial_sums = [numbers(1 + r, 2 * n, 3 * n) for r in range(n)]
    total, mine = sum(partial_sums), partial_sums[rank]
    rows, columns = np.split(whole, n)[rank], np.split(whole, n, 1)[rank]
    cases = {  # input, output, gradient of the output, gradient of the input
        "copy_to": (whole, whole, mine, total),
        "reduce_from": (mine, total, whole, whole),
        "repeat": (whole, whole, whole, whole / n),
        "gather_from": (columns, whole, whole, columns),
        "gather_sequence": (rows, whole, mine, np.split(total, n)[rank]),
        "gather_sequence_repeated": (rows, whole, whole, rows),
        "reduce_scatter_sequence": (mine, np.split(total, n)[rank], rows, whole),
    }
    for name, (x, expected, dy, dx) in cases.items():
        x = paddle.to_tensor(x, stop_gradient=False)
        y = getattr(mappings, name)(x, group=group)
        np.testing.assert_array_equal(y.numpy(), expected, name)
        paddle.autograd.backward([y], [paddle.to_tensor(dy)])
        np.testing.assert_array_equal(x.grad.numpy(), dx, name)


def check_vocab_parallel_cross_entropy(groups: Groups) -> None:
    """Every variant, with logits of a thousand that only the maximum over all ranks keeps finite."""
    group, (s, b, v) = groups.world, (5, 2, 6 * RANKS)
    random = np.random.default_rng(3)
    logits = random.normal(0, 2, (s, b, v))
    logits[1, 0, 0], logits[2, 1, v - 1] = 1e3, 1e3
    labels, seeds = paddle.to_tensor(random.integers(0, v, (b, s))), random.normal(0, 1, (b, s))
    columns = slice(group.rank * v // RANKS, (group.rank + 1) * v // RANKS)

    def both(function, x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        x = paddle.to_tensor(x, dtype, stop_gradient=False)
        losses = function(x, labels)
        paddle.autograd.backward([losses], [paddle.to_tensor(seeds, dtype)])
        return losses.numpy(), x.grad.numpy()

    for dtype, tolerance in (("float64", 1e-13), ("float32", 2e-6)):
        for name, variant in vocab_parallel.variants.items():
            expected = both(load_all()["cross_entropy"].variants[name].function, logits, dtype)
            ours = both(partial(variant.function, group=group), logits[:, :, columns], dtype)
            np.testing.assert_allclose(ours[0], expected[0], tolerance, tolerance, err_msg=name)
            np.testing.assert_allclose(ours[1], expected[1][:, :, columns], tolerance, tolerance, err_msg=name)


# ---- training ------------------------------------------------------------------------------------------------------


def same_model(world: GlooGroup, parallel: ParallelConfig, steps: int = 2) -> None:
    """In float64 the layout changes the last digits only: losses, norms, every gradient and every weight."""
    one = on_one_card(steps, "paddle", "fp64", parallel.data)
    many = on_many(steps, "paddle", "fp64", groups_of(parallel, world), parallel)
    np.testing.assert_allclose(many.losses, one.losses, 1e-12)
    np.testing.assert_allclose(many.norms, one.norms, 1e-11)
    assert set(many.state) <= set(one.state)
    assert {name for name in one.gradients if ".local_experts." not in name} < set(many.gradients)
    for name, value in many.gradients.items():
        np.testing.assert_allclose(value, one.gradients[name], 1e-8, 1e-12, err_msg=name)
    for name, value in many.state.items():
        np.testing.assert_allclose(value, one.state[name], 1e-8, 1e-10, err_msg=name)


def check_tensor_parallel_is_the_same_model(groups: Groups) -> None:
    for parallel in layouts():
        same_model(groups.world, parallel)


def check_tensor_and_context_parallel_together_are_the_same_model(groups: Groups) -> str | None:
    if RANKS < 4:
        return "skipped: needs four ranks"
    both = layout().replace(data=RANKS // 4, context=2)
    for parallel in both, both.replace(sequence_parallel=True, expert=2, expert_tensor=1):
        same_model(groups.world, parallel)


def check_tensor_parallel_losses_of_20_steps(groups: Groups) -> str | None:
    """The acceptance of tensor parallelism: paddle preset, float32, losses within 1e-5."""
    if RANKS > 2:
        return "skipped: on two ranks"
    one = on_one_card(20, "paddle", "fp32", 1)
    for parallel in layouts()[:2]:
        many = on_many(20, "paddle", "fp32", groups_of(parallel, groups.world), parallel)
        np.testing.assert_allclose(many.losses, one.losses, 0, 1e-5)


def check_presets_run_tensor_parallel(groups: Groups) -> str | None:
    """Also where Paddle's CPU has no kernels: bfloat16 differs by its rounding."""
    if RANKS > 2:
        return "skipped: on two ranks"
    parallel = layout(sequence_parallel=True)
    found = groups_of(parallel, groups.world)
    for preset, precision, tolerance in ("plain", "fp64", 1e-12), ("torch", "fp64", 1e-12), ("megatron", "bf16", 5e-3):
        one, many = on_one_card(1, preset, precision, 1), on_many(1, preset, precision, found, parallel)
        np.testing.assert_allclose(many.losses, one.losses, tolerance, err_msg=f"{preset} {precision}")


def check_initial_weights_are_the_same_on_any_layout(groups: Groups) -> None:
    parallel = layouts()[1]
    found = groups_of(parallel, groups.world)
    for precision in ("fp32", "bf16"):
        one = named_tensors(trainer("paddle", precision).model)
        tensors = named_tensors(trainer("paddle", precision, found, parallel).model)
        for name, value in shards.gather_full(tensors, found).items():
            assert value.tobytes() == one[name].numpy().tobytes(), name


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def without_maximum(self: GlooGroup, x: paddle.Tensor, op: str = "sum") -> paddle.Tensor:
    return x if op == "max" else ALL_REDUCE(self, x, op)


ALL_REDUCE = GlooGroup.all_reduce_
WHOLE_EXPERTS = {"expert_tensor": 1}
SLICES = {"sequence_parallel": True}
REPLICATED_SINK = {name: split for name, split in shards.SPLITS.items() if "attn_sink" not in name}
PLANTS = {
    "gradients of slices not summed": (SLICES, optimizer, "sum_slices", lambda gradients, group: None),
    "replicated gradients summed, though each is whole": (SLICES, shards, "WHOLE_SEQUENCE", ()),
    "the sink thought to be replicated": ({}, shards, "SPLITS", REPLICATED_SINK),
    "replicated parameters counted twice in the norm": ({}, gradients, "split_of", lambda name: True),
    "cross entropy without the maximum of all ranks": ({}, GlooGroup, "all_reduce_", without_maximum),
    "gradient not summed where a split computation begins": ({}, WholeAtRest, "copy", lambda self, x: x),
    "gradient not summed where the experts begin": ({}, WholeAtRest, "enter", lambda self, x: x),
    "gradient of a repeated computation counted twice": ({}, WholeAtRest, "repeat", lambda self, x: x),
    "gate and linear half split as one": ({}, GateAndLinear, "split", shards.ROWS),
    "tensor ranks send the same tokens": (WHOLE_EXPERTS, moe_layer, "own_assignments", lambda build: all_assignments),
}


def check_planted_tensor_bugs_are_seen(groups: Groups) -> str | None:
    if RANKS > 2:
        return "skipped: on two ranks"
    for bug, (more, *plant) in PLANTS.items():
        seen(bug, mock.patch.object(*plant), lambda more=more: same_model(groups.world, layout(**more), steps=1))


def check_other_replicated_weights_are_refused_everywhere(groups: Groups) -> None:
    parallel = layout()
    runner = trainer("paddle", "fp32", groups_of(parallel, groups.world), parallel)
    norm = runner.model.decoder.final_layernorm.weight
    if groups.world.rank % 2:  # the second rank of every tensor group, so that all replicas agree
        paddle.assign(norm + 1e-7, norm)
    try:
        runner.check_ranks()
    except UserError as error:
        assert "the weights of rank" in str(error), error
        return
    raise AssertionError("nothing was refused")
