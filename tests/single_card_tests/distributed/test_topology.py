"""Rank order, groups, what the launcher says, and layouts that are refused."""

import pytest

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed.connect import connect
from paddledsv4.distributed.group import ALONE, Group
from paddledsv4.distributed.launch import Launch
from paddledsv4.distributed.topology import group_of, rank_groups
from paddledsv4.errors import UserError
from paddledsv4.moe.experts import local_experts

ENVIRONMENT = {
    "PADDLE_TRAINER_ID": "1", "PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:4000,10.0.0.2:4001"
}  # fmt: skip


def test_megatrons_order():
    """tensor fastest, then context, then data; experts over neighbours."""
    groups = rank_groups(ParallelConfig(world_size=8, tensor=2, context=2, data=2, expert=4, expert_tensor=1))
    assert groups["world"] == [tuple(range(8))]
    assert groups["tensor"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["context"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["data"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups["replicas"] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert groups["expert"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups["expert_data"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups["expert_shards"] == groups["expert"] and len(groups["expert_tensor"]) == 8
    assert group_of(5, groups["context"]) == (5, 7)


def test_experts_are_split_like_the_rest_unless_the_layout_says_otherwise():
    """Expert tensor ranks are neighbours, then come the ranks that hold other experts."""
    groups = rank_groups(ParallelConfig(world_size=8, tensor=2, data=4, expert=2))
    assert groups["expert_tensor"] == groups["tensor"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["expert"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["expert_shards"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups["expert_data"] == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    "sizes", [{"data": 4, "expert": 2}, {"data": 4, "expert": 4}, {"data": 2, "tensor": 3}, {"context": 4, "expert": 2},
     {"data": 2, "tensor": 4, "expert": 2, "expert_tensor": 2}]
)
def test_every_kind_shares_out_all_ranks(sizes):
    world = sizes.get("data", 1) * sizes.get("tensor", 1) * sizes.get("context", 1)
    for groups in rank_groups(ParallelConfig(world_size=world, **sizes)).values():
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(world))
        assert len({len(ranks) for ranks in groups}) == 1 and all(list(r) == sorted(r) for r in groups)


def test_pipeline_is_named_and_refused():
    with pytest.raises(UserError, match="parallel.pipeline = 2: must be 1: pipeline parallelism is not built"):
        rank_groups(ParallelConfig(world_size=2, pipeline=2))


def test_the_launchers_environment():
    assert Launch.from_env({}) == Launch(0, 1)
    assert Launch.from_env(ENVIRONMENT) == Launch(1, 2, "10.0.0.1", 4000)


@pytest.mark.parametrize(
    "change",
    [{"PADDLE_TRAINER_ID": "2"}, {"PADDLE_TRAINER_ID": "x"}, {"PADDLE_TRAINER_ENDPOINTS": ""},
     {"PADDLE_TRAINER_ENDPOINTS": "host:port"}],
)  # fmt: skip
def test_a_broken_environment_is_one_sentence(change):
    with pytest.raises(UserError, match="start the ranks with python -m paddle.distributed.launch"):
        Launch.from_env(ENVIRONMENT | change)


@pytest.mark.parametrize(("started", "said"), [(1, "1 process was"), (3, "3 processes were")])
def test_a_wrong_number_of_processes_is_refused_at_once(started, said):
    with pytest.raises(UserError, match=f"world_size = 2, but {said} started: start 2 with .*--nproc_per_node 2"):
        with connect(ParallelConfig(world_size=2, data=2), Launch(0, started, "127.0.0.1", 1)):
            pass


def test_one_rank_alone_needs_no_backend():
    with connect(ParallelConfig(), Launch()) as groups:
        assert groups is ALONE and groups.expert.size == 1


def test_experts_are_shared_out_in_equal_runs():
    assert [list(local_experts(8, Group("expert", range(4), r))) for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"parallel.expert = 3: must divide n_routed_experts \(8\)"):
        local_experts(8, Group("expert", range(3), 0))
