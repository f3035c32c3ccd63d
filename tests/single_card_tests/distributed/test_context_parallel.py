"""Slices of a sequence: the roll against recorded cases, weights of unequal slices, tokens, lengths."""

import json

import numpy as np
import paddle
import pytest
from reference import ROOT, tiny_configs

from paddledsv4.config import ModelConfig, ParallelConfig
from paddledsv4.distributed.context_parallel import SequenceSlice, check_sequences
from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.data import batches
from paddledsv4.transformer.rotary import RotaryEmbedding

CASES = json.loads((ROOT / "tests" / "data" / "roll_cp_cases.json").read_text())["results"]
FLASH = ROOT / "tests" / "data" / "flash_config.json"


class Recorded(Group):
    """One rank of a group whose members all do ``collective`` on the tensors in ``everyone``."""

    def __init__(self, everyone: list[np.ndarray], rank: int):
        super().__init__("context", range(len(everyone)), rank)
        self.everyone = [paddle.to_tensor(x) for x in everyone]

    def all_gather(self, x):
        return paddle.concat([member[:, :1].t() for member in self.everyone], 0)

    def all_reduce_(self, x, op="sum"):
        paddle.assign(sum(member.astype(x.dtype).sum() for member in self.everyone).reshape(x.shape), x)
        return x


@pytest.mark.parametrize("case", ["ids_1x8", "mask_2x12", "labels_-100"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_roll_takes_the_next_ranks_first_token(ranks, case):
    recorded = [CASES[f"cp{ranks}"][str(rank)][case] for rank in range(ranks)]
    everyone = [np.array(r["local_in"]) for r in recorded]
    for rank, expected in enumerate(recorded):
        group = Recorded(everyone, rank) if ranks > 1 else Group("context")
        rolled = SequenceSlice(group, everyone[rank].shape[1]).roll_left(paddle.to_tensor(everyone[rank])).numpy()
        np.testing.assert_array_equal(rolled, expected["rolled"])
        assert rolled.sum() == expected["token_sum"] and rolled.dtype == everyone[rank].dtype
        if rank + 1 < ranks and case != "mask_2x12":  # a roll that took the slice's own first token would be seen
            assert (np.roll(everyone[rank], -1, 1) != rolled).any()


def test_slices_weigh_by_their_tokens():
    masks = [np.ones((1, 4)), np.array([[1.0, 1.0, 0.0, 0.0]])]
    weights = [SequenceSlice(Recorded(masks, rank), 4).weight(paddle.to_tensor(masks[rank])) for rank in (0, 1)]
    assert weights == [4 * 2 / 6, 2 * 2 / 6]
    losses = np.array([[1.0, 2, 3, 4], [5, 7, 100, 100]])
    means = [(loss * mask).sum() / mask.sum() for loss, mask in zip(losses, masks, strict=True)]
    assert np.dot(means, weights) / 2 == pytest.approx((1 + 2 + 3 + 4 + 5 + 7) / 6)
    nothing = [np.zeros((1, 4))] * 2
    assert SequenceSlice(Recorded(nothing, 0), 4).weight(paddle.to_tensor(nothing[0])) == 0.0


def test_one_rank_has_the_whole_sequence():
    sequence, x = SequenceSlice(Group("context"), 6), paddle.ones([6, 2])
    assert (sequence.start, sequence.whole, sequence.weight(x)) == (0, 6, 1.0)
    entries = sequence.entries(4, True)
    assert sequence.with_previous(x, 3) is x and entries.tokens(x) is x and entries.gather(x) is x
    assert sequence.local(x)[0] is x and entries.local(x)[0] is x and entries.whole == 1


@pytest.mark.parametrize(("data", "context"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_has_the_same_tokens_whatever_the_layout(data, context):
    train = tiny_configs()[1].replace(sequence_length=8, micro_batch_size=1, gradient_accumulation_steps=4 // data)
    parallel = ParallelConfig(world_size=data * context, data=data, context=context)
    table = np.arange(9 * 9).reshape(9, 9)
    pairs = {
        (int(x), int(y))
        for microbatch in range(4 // data) for rank in range(data) for piece in range(context)
        for x, y in zip(*map(np.ravel, batches(table, 1, microbatch, rank, train, parallel, piece)), strict=True)
    }
    assert pairs == {(row * 9 + i, row * 9 + i + 1) for row in (4, 5, 6, 7) for i in range(8)}


def test_sequences_that_do_not_fit_are_refused():
    model, train = tiny_configs()
    with pytest.raises(UserError, match=r"training.sequence_length = 30: must be divisible by parallel.context \(4\)"):
        check_sequences(model, train.replace(sequence_length=30), ParallelConfig(world_size=4, context=4))
    short = model.replace(max_position_embeddings=16)
    with pytest.raises(UserError, match="sequence_length = 17: must be at most the 16 positions of the model"):
        check_sequences(short, train.replace(sequence_length=17), ParallelConfig())


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_rotary_tables_reach_as_far_as_the_model(ratio):
    config, ops = ModelConfig.from_file(FLASH), Policy.preset("paddle").ops()
    rotary = RotaryEmbedding.for_ratio(config, ratio)
    stride = max(ratio, 1)
    cos, _ = rotary.table(ops, 131072 // stride, "float32", stride=stride)
    assert cos.shape == [131072 // stride, 32]
    with pytest.raises(UserError, match="past the 1048576 positions of this model: use shorter sequences"):
        rotary.table(ops, 1048576 // stride + 1, "float32", stride=stride)
    with pytest.raises(UserError, match="position 6 lies past the 6 positions"):
        RotaryEmbedding.for_ratio(config.replace(max_position_embeddings=6), ratio).table(ops, 7, "float32")


def test_without_max_position_embeddings_yarn_says_how_far():
    values = ModelConfig.from_file(FLASH).model_dump() | {"max_position_embeddings": None}
    assert ModelConfig.model_validate(values).max_positions == 65536 * 16
