"""Token files and the order of batches."""

import numpy as np
import pytest

from paddledsv4.config import OptimizerConfig, ParallelConfig, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.training.data import batches, load_tokens

TRAIN = TrainConfig(
    sequence_length=4,
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    steps=2,
    optimizer=OptimizerConfig(lr=1.0),
)


def table(rows: int) -> np.ndarray:
    """Row i, column j holds 10 i + j."""
    return 10 * np.arange(rows)[:, None] + np.arange(5)[None, :]


def test_rows_are_read_as_they_are(tmp_path):
    np.save(tmp_path / "t.npy", table(3).astype(np.int32))
    np.testing.assert_array_equal(load_tokens(tmp_path / "t.npy", 4, 100), table(3))


@pytest.mark.parametrize(("vocab", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_flat_binary(tmp_path, vocab, dtype):
    np.arange(14, dtype=dtype).tofile(tmp_path / "t.bin")
    rows = load_tokens(tmp_path / "t.bin", 4, vocab)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]])


def test_flat_npy_predicts_every_token_but_the_first_once(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(13, dtype=np.uint16))
    rows = load_tokens(tmp_path / "t.npy", 4, 13)
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 13))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.npy", None, "no such file"),
        ("t.txt", b"1 2 3", "must be an .npy or a .bin"),
        ("t.npy", b"not numpy", "not a readable .npy"),
        ("t.npy", b"", "not a readable .npy"),
        ("t.npy", np.zeros((2, 5)), "dtype float64, must hold integers"),
        ("t.npy", np.zeros((2, 4), int), "shape [2, 4], must be [rows, sequence_length + 1 = 5]"),
        ("t.npy", np.zeros((2, 2, 5), int), "shape [2, 2, 5]"),
        ("t.npy", np.zeros((0, 5), int), "no rows"),
        ("t.npy", np.zeros(4, int), "has 4 tokens, one row needs sequence_length + 1 = 5"),
        ("t.npy", np.full((1, 5), 100), "ids from 100 to 100, must lie in [0, vocab_size = 100)"),
        ("t.npy", np.full((1, 5), -1), "ids from -1"),
        ("t.bin", b"abc", "has 3 bytes, must be a positive multiple of 2"),
        ("t.bin", b"", "has 0 bytes"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load_tokens(tmp_path / name, 4, 100)
    assert said in str(caught.value) and name in str(caught.value)


def test_inputs_and_labels():
    inputs, labels = batches(table(12), 0, 1, 0, TRAIN, ParallelConfig())
    assert inputs.dtype == labels.dtype == np.int64
    np.testing.assert_array_equal(inputs, [[20, 21, 22, 23], [30, 31, 32, 33]])
    np.testing.assert_array_equal(labels, inputs + 1)


def test_every_row_once_in_the_order_of_the_bundle():
    """Step-major, then microbatch, then data-parallel rank; each takes the next two rows."""
    parallel = ParallelConfig(world_size=2, data=2)
    seen = [
        int(row[0]) // 10
        for step in range(2)
        for microbatch in range(3)
        for rank in range(2)
        for row in batches(table(24), step, microbatch, rank, TRAIN, parallel)[0]
    ]
    assert seen == list(range(24))


def test_epochs_wrap_inside_a_batch():
    inputs, _ = batches(table(7), 1, 0, 0, TRAIN, ParallelConfig())  # rows 6 and 7
    np.testing.assert_array_equal(inputs[:, 0], [60, 0])
