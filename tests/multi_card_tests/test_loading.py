"""Loading on many ranks: the same bits as on one, little memory, and errors that reach everybody."""

import json
import sys
from pathlib import Path

import pytest
from ranks import ROOT, run_ranks

sys.path.append(str(ROOT / "tests" / "single_card_tests" / "weights"))

from generated import released, small_config, write_checkpoint  # noqa: E402
from loading_jobs import alone  # noqa: E402
from test_failures import only_error  # noqa: E402

from paddledsv4.weights.names import expert_index, tensors  # noqa: E402
from paddledsv4.weights.source import Source, listing  # noqa: E402


def load(count: int, job: str, folder: Path, expert: int, limit: float = 120) -> list[dict]:
    file = folder.parent / "outcome"
    ended = run_ranks(count, job, folder, expert, file, limit=limit, script="loading_jobs.py")
    assert all(rank.code == 0 for rank in ended), [rank.errors[-2000:] for rank in ended]
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return released(tmp_path_factory.mktemp("loading") / "released")


@pytest.mark.parametrize(
    ("count", "expert", "job"),
    [
        (2, 2, "load"),
        (2, 1, "without_files"),
        pytest.param(4, 2, "load", marks=pytest.mark.slow),
    ],
)
def test_every_rank_has_the_bits_of_one(checkpoint, count, expert, job):
    whole = alone(checkpoint)["md5"]
    experts = small_config().n_routed_experts
    for rank, outcome in enumerate(load(count, job, checkpoint, expert)):
        mine = range(rank % expert * experts // expert, (rank % expert + 1) * experts // expert)
        held = {n: md5 for n, md5 in whole.items() if expert_index(n) is None or expert_index(n) in mine}
        assert outcome["md5"] == held


def _corrupt(stored, data: bytes) -> None:
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + stored.size - len(data))
        file.write(data)


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [
        ("layers.0.attn.wkv.weight", "shape", "shape [16, 128], the config gives [32, 128]"),  # rank 0 sees the header
        ("head.weight", "number", "tensor head.weight has NaN or infinite numbers"),  # of a dense tensor, on rank 0
        ("layers.3.ffn.experts.7.w2.scale", "number", "experts.7.w2.scale has NaN or infinite numbers"),  # on rank 1
    ],
)
def test_what_one_rank_finds_stops_all(tmp_path, name, where, said):
    config = small_config()
    what = listing(config) | ({name: ("F8_E4M3", (16, 128))} if where == "shape" else {})
    folder = write_checkpoint(tmp_path / "a", what, config)
    if where == "number":
        _corrupt(Source.open(folder, config).stored[name], b"\xff" if name.endswith("scale") else b"\x80\x7f")
    ended = run_ranks(2, "load", folder, 2, tmp_path / "outcome", script="loading_jobs.py")
    for rank in ended:
        assert rank.code == 2 and float(rank.output.splitlines()[-1]) < 20  # seconds after the ranks had met
        assert said in only_error(rank.errors)


# ---- a checkpoint of more than a gigabyte --------------------------------------------------------------------------

LARGE = {
    "hidden_size": 1024, "vocab_size": 32768, "moe_intermediate_size": 1024, "n_routed_experts": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = small_config(**LARGE)
    folder = tmp_path_factory.mktemp("large") / "ours"
    what = {name: ("F32" if t.kind == "F32" else "I64" if t.kind == "I64" else "BF16", t.shape)
            for name, t in tensors(config, "paddledsv4").items()}
    yield write_checkpoint(folder, what, config, files=6)
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("expert", [1, 4])
def test_memory_of_four_ranks(large, expert):
    """Non-reading ranks: 1.2 times their shard plus the largest tensor; rank 0, which reads: two files more."""
    files = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert sum(files) > 1e9
    for rank, outcome in enumerate(load(4, "load", large, expert, limit=580)):
        bound = 1.2 * outcome["shard"] + outcome["largest"] + (0 if rank else 2 * max(files))
        figures = {key: f"{outcome[key] / 1e6:.0f} MB" for key in ("grown", "shard", "largest")}
        print(f"expert {expert}, rank {rank}: {figures}, bound {bound / 1e6:.0f} MB, {outcome['seconds']:.1f} s")
        assert outcome["grown"] <= bound
