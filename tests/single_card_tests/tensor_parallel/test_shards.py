"""The table of split parameters against the layers that split them, on ranks that never talk."""

import functools

import numpy as np
import paddle
import pytest
from reference import initial_state, tiny_configs

from paddledsv4.config import ParallelConfig
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.moe.dispatcher import all_assignments, assignments_of_share, own_assignments
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.tensor_parallel.cross_entropy import vocab_parallel
from paddledsv4.tensor_parallel.layers import Embedding
from paddledsv4.training.gradients import parts
from paddledsv4.training.trainer import Trainer
from paddledsv4.transformer.build import Build
from paddledsv4.weights.load import load_megatron_state, named_tensors
from paddledsv4.weights.shards import Split, on_slices, shards_of_rank, split_of


def rank_of(ranks: int, rank: int, experts: int | None = None) -> Groups:
    """The groups of a tensor rank; experts are split over the first ``experts`` of the ranks."""
    tensor = Group("tensor", range(ranks), rank)
    return Groups(tensor=tensor, expert_tensor=tensor if experts is None else Group("expert_tensor", range(experts)))


@functools.cache
def model(groups: Groups = ALONE, sequence_parallel: bool = False, **changes) -> DeepseekV4Model:
    paddle.seed(0)
    config = tiny_configs()[0].replace(num_hidden_layers=2, compress_ratios=(4, 128, 0), **changes)
    return DeepseekV4Model(config, Policy.preset(), groups=groups, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("experts", [None, 1])
def test_every_rank_holds_the_shards_that_the_table_says(experts):
    full = {name: t.numpy() for name, t in named_tensors(model()).items()}
    shards = []
    for rank in range(2):
        groups = rank_of(2, rank, experts)
        ours = {name: t.numpy() for name, t in named_tensors(model(groups)).items()}
        expected = shards_of_rank(full, groups)
        assert list(ours) == list(expected) == list(full)
        for name, value in ours.items():
            assert value.tobytes() == expected[name].tobytes() and value.shape == expected[name].shape, name
        shards.append(ours)
    for name, whole in full.items():
        smaller = shards[0][name].shape != whole.shape
        assert smaller == (split_of(name) is not None and not (experts and ".local_experts." in name)), name
        if smaller:
            assert split_of(name).join(part[name] for part in shards).tobytes() == whole.tobytes(), name


def test_what_is_split():
    names = dict(model().named_parameters())
    split = {name.split(".layers.0.")[-1].replace("mtp_model_layer.", "") for name in names if split_of(name)}
    assert {n for n in split if ".layers." not in n and ".local_experts." not in n} == {
        "embedding.word_embeddings.weight", "output_layer.weight", "self_attention.core_attention.attn_sink",
        "self_attention.linear_o_group_proj", "self_attention.linear_proj.weight",
        "self_attention.linear_q_up_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.linear_fc2.weight",
    }  # fmt: skip
    assert {name.split(".")[-1] if "." in name else name for name in names if on_slices(name)} == {
        "weight", "bias", "alpha_pre", "alpha_post", "alpha_res", "hc_head_fn", "hc_head_base", "hc_head_scale"
    }  # fmt: skip
    assert not any(".self_attention." in name or ".mlp." in name for name in names if on_slices(name))


def test_gate_and_linear_half_are_shared_out_apart():
    full = np.arange(8).repeat(3).reshape(8, 3)
    split = Split(0, blocks=2)
    assert split.shard(full, 1, 2)[:, 0].tolist() == [2, 3, 6, 7]
    assert (split.join(split.shard(full, rank, 4) for rank in range(4)) == full).all()


def test_a_full_state_loads_into_a_shard():
    config = tiny_configs()[0]
    rank = DeepseekV4Model(config, Policy.preset(), groups=rank_of(4, 3))
    load_megatron_state(rank, shards_of_rank(initial_state(), rank_of(4, 3)))
    head = initial_state()["output_layer.weight"]
    assert (rank.output_layer.weight.numpy() == head[3 * len(head) // 4 :]).all()


@pytest.mark.parametrize(
    ("ranks", "changes", "said"),
    [
        (3, {}, r"parallel.tensor = 3: must divide vocab_size \(512\)"),
        (8, {}, r"parallel.tensor = 8: must divide o_groups \(4\)"),
        (4, {"num_attention_heads": 6, "o_groups": 4}, r"parallel.tensor = 4: must divide num_attention_heads \(6\)"),
        (4, {"moe_intermediate_size": 66}, r"parallel.expert_tensor = 4: must divide moe_intermediate_size \(66\)"),
    ],
)
def test_sizes_that_do_not_divide_are_one_sentence(ranks, changes, said):
    with pytest.raises(UserError, match=said):
        model(rank_of(ranks, 0), **changes)


def test_one_rank_is_what_it_was():
    """No mapping, no mask and no reduction is built in; the bits are tested elsewhere."""
    one = model(sequence_parallel=True)
    assert type(one.embedding) is Embedding and one.ops.cross_entropy is Build(one.config, one.policy).ops.cross_entropy
    x = paddle.ones([2, 1, 4])
    passages = (one.tensor.gather, one.tensor.enter, one.tensor.leave, one.tensor.copy, one.tensor.repeat)
    assert all(passage(x) is x for passage in passages)
    assert own_assignments(Build(one.config, one.policy)) is all_assignments


def test_tensor_ranks_share_out_the_tokens_for_whole_experts():
    routing_map = paddle.ones([7, 3], "bool")
    shares = [assignments_of_share(routing_map, 3, mine).astype("int64").numpy() for mine in range(3)]
    assert (sum(shares) == 1).all() and all(1 <= share[:, 0].sum() <= 3 for share in shares)


def test_the_norm_counts_what_all_ranks_hold_once():
    first, second = (parts(model(groups), groups)[0].counted for groups in (rank_of(2, 0), rank_of(2, 1)))
    assert first - second == {name for name, _ in model().named_parameters() if split_of(name) is None}
    assert second < first == {name for name, _ in model().named_parameters()}


def test_a_sequence_that_cannot_be_sliced_is_refused():
    config, train = tiny_configs()
    parallel = ParallelConfig(world_size=3, tensor=3, sequence_parallel=True)
    with pytest.raises(UserError, match=r"tensor x context \(3\) must divide training.sequence_length"):
        Trainer(config, train, Policy.preset(), np.zeros([1, 9]), parallel=parallel, groups=rank_of(3, 0))


@pytest.mark.parametrize("name", vocab_parallel.variants)
def test_cross_entropy_in_a_group_of_one_has_the_bits_of_the_plain_op(name):
    random = np.random.default_rng(1)
    labels = paddle.to_tensor(random.integers(0, 40, (2, 9)))
    logits = random.normal(0, 3, (9, 2, 40)).astype("float32")

    def both(function) -> list[bytes]:
        x = paddle.to_tensor(logits, stop_gradient=False)
        losses = function(x, labels)
        (losses * losses).sum().backward()
        return [losses.numpy().tobytes(), x.grad.numpy().tobytes()]

    parallel, alone = (op.variants[name].function for op in (vocab_parallel, load_all()["cross_entropy"]))
    assert both(lambda x, y: parallel(x, y, group=ALONE.tensor)) == both(alone)
