"""Tensors that ranks split: every way of cutting them is put together again in every other way."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddledsv4.distributed.group import ALONE, Group
from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint import shard
from paddledsv4.training.checkpoint.resume import _copy, _Tensors
from paddledsv4.training.checkpoint.shard import Piece
from paddledsv4.training.checkpoint.state import SAFETENSORS, _piece, host_array, owned

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


def test_a_split_parameter_says_where_it_lies():
    tensor = paddle.zeros([3, 8])
    tensor.split_axis = 0
    group = Group("tensor", (0, 1), 1)
    assert _piece("m/w", tensor, tensor, group) == Piece("m/w", "F32", (3, 8), (6, 8), (3, 0))
    assert _piece("m/w", tensor, SimpleNamespace(), group) == Piece.whole("m/w", "F32", (3, 8))


def test_one_rank_writes_each_piece():
    """data 2 x tensor 2, rank = 2 data + tensor: whole tensors by rank 0, halves and experts by ranks 0 and 1."""
    whole, half = Piece.whole("m/w", "F32", (6, 8)), pieces("rows")[1]
    expert = Piece.whole("m/mlp.experts.local_experts.1.linear_fc1.weight", "F32", (2,))
    writers = {"whole": [], "half": [], "expert": []}
    for rank in range(4):
        groups = replace(
            ALONE, replicas=Group("replicas", (rank % 2, rank % 2 + 2), rank // 2),
            tensor=Group("tensor", (0, 1), rank % 2), expert_data=Group("expert_data", (1, 3), rank // 2),
        )  # fmt: skip
        for name, piece in (("whole", whole), ("half", half), ("expert", expert)):
            if owned(piece, groups):
                writers[name].append(rank)
    assert writers == {"whole": [0], "half": [0, 1], "expert": [0, 1]}


@pytest.mark.parametrize("dtype", SAFETENSORS)
def test_every_dtype(tmp_path, dtype):
    tensor = paddle.arange(6).reshape([2, 3]).astype(dtype)
    piece = _piece("model/x", tensor, tensor, Group())
    record = shard.write(tmp_path / "x.safetensors", [piece], [host_array(tensor)])
    again = paddle.zeros([2, 3], dtype)
    _copy(piece, again, _Tensors(tmp_path, [record]).find(piece))
    assert (again.astype("float64") == tensor.astype("float64")).all() and again.dtype == tensor.dtype
