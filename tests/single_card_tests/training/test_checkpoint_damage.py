"""A checkpoint that is damaged: one sentence with the file and the tensor, and an older checkpoint to take instead."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import small, state_bytes, train
from safetensors import safe_open

from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint.record import seal

SHARD, RANK, RECORD = "rank_00000.safetensors", "rank_00000.json", "checkpoint.json"


@pytest.fixture(scope="module")
def runner():
    return small(steps=2)


@pytest.fixture(scope="module")
def kept(runner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    train(runner, folder, save_interval=1)
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def begin_of(path: Path, name: str) -> int:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return 8 + size + json.loads(path.read_bytes()[8 : 8 + size])[name]["data_offsets"][0]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


EXPERT = "model/decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
DAMAGE = {
    "a bit of a tensor": (
        lambda f: flip(f / SHARD, begin_of(f / SHARD, EXPERT) + 5), SHARD, f"tensor {EXPERT} is damaged"),
    "the last bit": (lambda f: flip(f / SHARD, -1), SHARD, "is damaged: its CRC-32"),
    "a bit of the header's length": (lambda f: flip(f / SHARD, 0), SHARD, "the header is damaged"),
    "a bit of the header": (lambda f: flip(f / SHARD, 200), SHARD, "the header is damaged"),
    "a file cut within a tensor": (
        lambda f: cut(f / SHARD, begin_of(f / SHARD, EXPERT) + 5), SHARD, f"truncated: tensor {EXPERT} is not whole"),
    "an empty file": (lambda f: cut(f / SHARD, 0), SHARD, "has 0 bytes instead of"),
    "a file that is longer": (lambda f: (f / SHARD).open("ab").write(b"x"), SHARD, "not what was written"),
    "no shard": (lambda f: (f / SHARD).unlink(), SHARD, "cannot be read (No such file or directory); it holds "),
    "no list of tensors": (lambda f: (f / RANK).unlink(), RANK, "cannot be read (No such file or directory)"),
    "another list of tensors": (
        lambda f: edit(f / RANK, lambda v: v["tensors"][0].update(offset=[1])), RANK, "is damaged: its MD5"),
    "half a list": (lambda f: cut(f / RANK, 300), RANK, "is not JSON"),
    "half a record": (lambda f: cut(f / RECORD, 300), RECORD, "is not JSON"),
    "a record that is no mapping": (lambda f: (f / RECORD).write_text("[]"), RECORD, "is not a mapping"),
    "another step": (lambda f: edit(f / RECORD, lambda v: v.update(step=7)), RECORD, "is damaged: its MD5"),
    "no record": (lambda f: (f / RECORD).unlink(), "iter_0000002", "is no complete checkpoint"),
    "no folder": (lambda f: shutil.rmtree(f), "iter_0000002", "is no complete checkpoint"),
    "a symlink loop": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).symlink_to(f / SHARD)), SHARD, "Too many levels of symbolic"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_sentence(runner, folder, kind):
    damage, file, says = DAMAGE[kind]
    damage(folder / "iter_0000002")
    with pytest.raises(UserError) as refused:
        train(runner, source=str(folder))
    message = str(refused.value)
    assert file in message and says in message and "\n" not in message
    assert message.endswith(f"an earlier complete checkpoint is there: --resume {folder / 'iter_0000001'}")


def test_the_one_before_is_whole(runner, folder):
    flip(folder / "iter_0000002" / SHARD, -1)
    assert len(train(runner, source=str(folder / "iter_0000001"))[0]) == 1


def test_with_no_other_it_says_so(runner, folder):
    flip(folder / "iter_0000001" / SHARD, -1)
    with pytest.raises(UserError, match="is damaged.*; there is no earlier complete checkpoint"):
        train(runner, source=str(folder / "iter_0000001"))


def test_nothing_is_copied_unless_everything_fits(folder):
    runner = small(steps=2)
    before = state_bytes(runner)
    (folder / "iter_0000002" / SHARD).unlink()
    with pytest.raises(UserError):
        train(runner, source=str(folder))
    assert state_bytes(runner) == before


def resealed(folder: Path, change) -> None:
    """The lists of tensors edited by somebody who knows how to seal them."""
    edit(folder / RANK, change)
    record = json.loads((folder / RECORD).read_text())
    record.pop("md5")
    record["files"][RANK] = hashlib.md5((folder / RANK).read_bytes()).hexdigest()
    (folder / RECORD).write_text(json.dumps(seal(record)))


def drop(name):
    return lambda values: values.update(tensors=[t for t in values["tensors"] if t["name"] != name])


def twice_as_large(values):
    found = next(t for t in values["tensors"] if t["name"] == "model/embedding.word_embeddings.weight")
    found["global_shape"] = [2 * size for size in found["global_shape"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("v/output_layer.weight"), "iter_0000002: lacks v/output_layer.weight, which this run needs"),
        (lambda v: v["tensors"].append(v["tensors"][0] | {"name": "m/other"}), "holds m/other, which"),
        (twice_as_large, "word_embeddings.weight has global_shape (192, 128), this run's has (96, 64)"),
    ],
)
def test_tensors_that_do_not_fit(runner, folder, change, says):
    resealed(folder / "iter_0000002", change)
    with pytest.raises(UserError) as refused:
        train(runner, source=str(folder))
    assert says in str(refused.value)


def test_what_is_no_checkpoint(runner, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: no file latest"):
        train(runner, source=str(tmp_path))
    (tmp_path / "latest").write_bytes(b"\xff\x00../..")
    with pytest.raises(UserError, match="latest: .* is not the name of a checkpoint; there is no earlier"):
        train(runner, source=str(tmp_path))


def test_safetensors_reads_the_shard(kept):
    """The file is what everybody else takes for a safetensors file."""
    runner = small(steps=2)
    train(runner, source=str(kept))
    with safe_open(kept / "iter_0000002" / SHARD, framework="np") as file:
        for name, data in state_bytes(runner).items():
            assert file.get_tensor(name).tobytes() == data
