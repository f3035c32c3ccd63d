"""Metrics of many ranks are those of one card on the same batches; profiles are those of the ranks chosen."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from layouts import groups_of, trainer

from paddledsv4.config import ParallelConfig
from paddledsv4.config.metrics import MetricsConfig
from paddledsv4.config.profile import ProfileConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.observe.metrics import attention, mixing, routing
from paddledsv4.observe.metrics.collect import Collector
from paddledsv4.observe.metrics.log import read_metrics
from paddledsv4.observe.metrics.run import with_metrics
from paddledsv4.observe.profile.record import profile_path, with_profile
from paddledsv4.observe.profile.table import op_times
from paddledsv4.observe.profile.trace import read_trace

RANKS = int(os.environ["PADDLE_TRAINERS_NUM"])
LAYOUTS = [{"data": RANKS, "expert": 2}, {"data": RANKS // 2, "tensor": 2}, {"data": RANKS // 2, "context": 2}]


def metrics(groups: Groups = ALONE, parallel: ParallelConfig | None = None, accumulation: int = 1) -> dict[str, float]:
    """Of the second step, in float64; not those that depend on the machine."""
    runner = trainer("paddle", "fp64", groups, parallel, gradient_accumulation_steps=accumulation)
    collector = Collector(runner, 2)
    runner.observers.append(collector)
    list(runner.train(2))
    return {tag: x for tag, x in collector.values.items() if tag.split("/")[0] not in ("speed", "memory")}


def agree(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return ours.keys() == theirs.keys() and all(np.isclose(ours[tag], theirs[tag], 1e-9, 1e-12) for tag in ours)


def check_metrics_are_those_of_one_card(groups: Groups) -> None:
    for layout in LAYOUTS:
        parallel = ParallelConfig(world_size=RANKS, **layout)
        one, many = metrics(accumulation=parallel.data), metrics(groups_of(parallel, groups.world), parallel)
        assert agree(many, one), [(tag, many.get(tag), x) for tag, x in one.items() if many.get(tag) != x]


def check_metrics_of_one_rank_only_would_be_seen(groups: Groups) -> None:
    parallel = ParallelConfig(world_size=RANKS, **LAYOUTS[0])
    one, own = metrics(accumulation=RANKS), lambda group, arrays, op="sum": dict(arrays)
    for module, group in ((routing, "router/"), (mixing, "mhc/"), (attention, "attention/")):
        with mock.patch.object(module, "reduced", own):
            many = metrics(groups_of(parallel, groups.world), parallel)
        wrong = {tag for tag in one if not np.isclose(many[tag], one[tag], 1e-9, 1e-12)}
        assert any(tag.startswith(group) for tag in wrong), (group, wrong)


def check_rank_0_writes_the_metrics(groups: Groups) -> None:
    parallel = ParallelConfig(world_size=RANKS, **LAYOUTS[0])
    folder = Path(f"{sys.argv[2]}.metrics") / str(groups.world.rank)
    runner = trainer("paddle", "fp32", groups_of(parallel, groups.world), parallel)
    list(with_metrics(runner, runner.train(2), MetricsConfig(formats=("jsonl",), every=1), folder))
    assert folder.exists() == (groups.world.rank == 0)
    if groups.world.rank == 0:
        steps = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in steps] == [1, 2] and steps[0]["memory/host_peak_mib"] > 0


def check_only_the_chosen_rank_is_profiled(groups: Groups) -> None:
    """And with its exchanges; the losses keep their bits on all ranks."""
    parallel, chosen = ParallelConfig(world_size=RANKS, **LAYOUTS[0]), ProfileConfig(steps="2", ranks=(1,))
    folder = Path(f"{sys.argv[2]}.profiles")
    there = groups_of(parallel, groups.world)
    before = {name: dict(vars(group)) for name, group in vars(there).items()}
    watched, plain = (trainer("paddle", "fp32", there, parallel) for _ in range(2))
    seen = [(r.losses, r.grad_norm) for r in with_profile(watched, watched.train(2), chosen, folder)]
    assert seen == [(r.losses, r.grad_norm) for r in plain.train(2)]
    assert {name: dict(vars(group)) for name, group in vars(there).items()} == before
    groups.world.barrier()
    assert [file.name for file in (folder / "profile").iterdir()] == ["rank1.json"]
    times = op_times(read_trace(profile_path(folder, 1)))
    exchanges = {op.name: op.calls for op in times.ops if "(" in op.name}
    assert times.steps == 1 and any(name.startswith("all_to_all") for name in exchanges), exchanges
