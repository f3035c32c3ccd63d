"""Tensors that ranks split: every way of cutting them is put together again in every other way."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint import shard
from paddledsv4.training.checkpoint.resume import _copy, _Tensors
from paddledsv4.training.checkpoint.shard import Piece
from paddledsv4.training.checkpoint.state import SAFETENSORS, _piece, host_array, owned
from paddledsv4.weights.shards import split_of

WHOLE = np.arange(48, dtype=np.float32).reshape(6, 8)
CUTS = {"whole": (1, 1), "rows": (2, 1), "columns": (1, 2), "thirds of rows": (3, 1), "both": (2, 4)}


def pieces(name: str) -> list[Piece]:
    rows, columns = CUTS[name]
    shape = (6 // rows, 8 // columns)
    return [Piece("m/w", "F32", shape, (6, 8), (i * shape[0], j * shape[1]))
            for i in range(rows) for j in range(columns)]  # fmt: skip


def part(piece: Piece) -> np.ndarray:
    return WHOLE[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))]


def written(folder, cut: list[Piece]) -> _Tensors:
    return _Tensors(folder, [shard.write(folder / f"rank_{i:05d}.safetensors", [p], [part(p)])
                             for i, p in enumerate(cut)])  # fmt: skip


@pytest.mark.parametrize("saved", CUTS)
@pytest.mark.parametrize("wanted", CUTS)
def test_every_cut_from_every_other(tmp_path, saved, wanted):
    tensors = written(tmp_path, pieces(saved))
    for piece in pieces(wanted):
        tensor = paddle.zeros(piece.shape)
        _copy(piece, tensor, tensors.find(piece))
        assert np.array_equal(tensor.numpy(), part(piece))


def test_a_hole_is_seen(tmp_path):
    with pytest.raises(UserError, match="tensor m/w is not whole: 24 elements of"):
        written(tmp_path, pieces("rows")[:1]).find(pieces("whole")[0])


def tensor_rank(rank: int) -> Groups:
    """The groups of one of two tensor ranks that split experts as everything else."""
    tensor = Group("tensor", (0, 1), rank)
    return replace(ALONE, tensor=tensor, expert_tensor=tensor, expert_shards=tensor)


def test_a_split_parameter_says_where_it_lies():
    tensor, second = paddle.zeros([4, 8]), tensor_rank(1)
    head, row_parallel = "output_layer.weight", "decoder.layers.0.self_attention.linear_proj.weight"
    fc1 = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"
    assert _piece("m", head, tensor, second) == Piece(f"m/{head}", "F32", (4, 8), (8, 8), (4, 0))
    assert _piece("m", row_parallel, tensor, second) == Piece(f"m/{row_parallel}", "F32", (4, 8), (4, 16), (0, 8))
    assert _piece("m", "x.norm.weight", tensor, second) == Piece.whole("m/x.norm.weight", "F32", (4, 8))
    # gate and linear half: rows of both, one piece of the whole as [2, ...]
    assert _piece("m", fc1, tensor, second) == Piece(f"m/{fc1}", "F32", (2, 2, 8), (2, 4, 8), (0, 2, 0))


def test_gate_and_linear_halves_move_between_layouts(tmp_path):
    """Shards of two ranks make the weight that one rank has: gate rows of both, then linear rows of both."""
    name = "decoder.layers.0.mlp.shared_experts.linear_fc1.weight"
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    shards = [split_of(name).shard(whole, rank, 2) for rank in range(2)]
    cut = [_piece("m", name, paddle.to_tensor(array), tensor_rank(rank)) for rank, array in enumerate(shards)]
    records = [shard.write(tmp_path / f"rank_{i:05d}.safetensors", [p], [a])
               for i, (p, a) in enumerate(zip(cut, shards, strict=True))]  # fmt: skip
    tensor = paddle.zeros([8, 8])
    piece = _piece("m", name, tensor, ALONE)
    _copy(piece, tensor, _Tensors(tmp_path, records).find(piece))
    assert np.array_equal(tensor.numpy(), whole)


def test_one_rank_writes_each_piece():
    """data 2 x tensor 2, rank = 2 data + tensor: whole tensors by rank 0, halves and experts by ranks 0 and 1."""
    whole, half = Piece.whole("m/w", "F32", (6, 8)), pieces("rows")[1]
    expert = Piece.whole("m/mlp.experts.local_experts.1.linear_fc1.weight", "F32", (2,))
    writers = {"whole": [], "half": [], "expert": []}
    for rank in range(4):
        groups = replace(
            ALONE, replicas=Group("replicas", (rank % 2, rank % 2 + 2), rank // 2),
            tensor=Group("tensor", (0, 1), rank % 2), expert_data=Group("expert_data", (1, 3), rank // 2),
            expert_shards=Group("expert_shards", (0, 1), rank % 2),
        )  # fmt: skip
        for name, piece in (("whole", whole), ("half", half), ("expert", expert)):
            if owned(piece, groups):
                writers[name].append(rank)
    assert writers == {"whole": [0], "half": [0, 1], "expert": [0, 1]}


@pytest.mark.parametrize("dtype", SAFETENSORS)
def test_every_dtype(tmp_path, dtype):
    tensor = paddle.arange(6).reshape([2, 3]).astype(dtype)
    piece = _piece("model", "x", tensor, ALONE)
    record = shard.write(tmp_path / "x.safetensors", [piece], [host_array(tensor)])
    again = paddle.zeros([2, 3], dtype)
    _copy(piece, again, _Tensors(tmp_path, [record]).find(piece))
    assert (again.astype("float64") == tensor.astype("float64")).all() and again.dtype == tensor.dtype
