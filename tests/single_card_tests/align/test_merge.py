"""align merge: what two ranks wrote becomes one bundle, or one sentence that says what does not fit."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_bundle import small_description
from synthetic import loss
from typer.testing import CliRunner

from align.bundle import load_bundle
from align.capture.store import Folder
from align.capture.unify import Holder, join, same_bits, unify
from align.cli import app
from align.logwriter import LossLogWriter
from paddledsv4.errors import UserError
from paddledsv4.weights.names import expert_index, from_megatron, to_megatron, with_expert

EXPERT = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2.weight"
STEPS, MICROBATCHES = 2, 2


def weights(rank: int) -> dict[str, np.ndarray]:
    """Two of four experts, numbered from 0 on each rank, and a dense tensor that all share."""
    experts = {EXPERT.format(i): np.full((2, 3), 10.0 * (2 * rank + i), np.float32) for i in range(2)}
    return experts | {"decoder.final_layernorm.weight": np.arange(4, dtype=np.float32)}


def tokens(rank: int) -> np.ndarray:
    """Rows that name their step, microbatch, rank and place in the microbatch."""
    places = [(s, m, b) for s in range(STEPS) for m in range(MICROBATCHES) for b in range(2)]
    return np.array([[s, m, rank, b] + [0] * 21 for s, m, b in places], np.int32)


def write_rank(path, rank: int, changed: dict | None = None) -> None:
    described = small_description(STEPS)
    described["parallel"] |= {"world_size": 2, "data": 2, "expert": 2}
    described["rank"] = {
        "rank": rank,
        "data": rank,
        "expert": rank,
        "tensor": 0,
        "context": 0,
        "pipeline": 0,
        "split": {},
    }
    with Folder(path) as folder:
        folder.json("bundle.json", described)
        own = weights(rank) | (changed or {})
        folder.weights("init.safetensors", own)
        folder.weights("final.safetensors", own)
        folder.tensors("trace/param_grads", {n: 2 * t for n, t in own.items()}, norms=True)
        folder.tensors("trace/optimizer", {f"m/{n}": t for n, t in own.items()})
        folder.tensors("trace/forward", {"logits": np.full(3, rank, np.float32)})
        folder.json("trace/after_step1.json", {"params": {n: str(t.sum()) for n, t in own.items()}, "buffers": {}})
        np.save(folder.hidden / "tokens.npy", tokens(rank))
        with LossLogWriter(folder.hidden / "losses.jsonl", {}) as log:
            for step in range(1, STEPS + 1):
                for m in range(MICROBATCHES):
                    log.losses(step, m, rank, loss(step, m, rank, "main"), loss(step, m, rank, "mtp"))
                log.grad_norm(step, 1.5)


@pytest.fixture
def ranks(tmp_path):
    paths = [tmp_path / "job/rank00000", tmp_path / "job/rank00001"]
    for rank, path in enumerate(paths):
        write_rank(path, rank)
    return paths


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_two_expert_parallel_ranks(align, ranks, tmp_path):
    result = align("merge", *reversed(ranks), "--out", "whole")
    assert result.exit_code == 0, result.stderr
    merged = load_bundle("whole")
    assert merged.name == "whole" and merged.parallel.expert == 2 and len(merged.losses().main) == 8
    state = merged.init()
    assert [state[EXPERT.format(i)][0, 0] for i in range(4)] == [0, 10, 20, 30] and len(state) == 5
    order = [tuple(row[:4]) for row in merged.tokens]
    assert order == [(s, m, r, b) for s in range(2) for m in range(2) for r in range(2) for b in range(2)]
    trace = tmp_path / "whole/trace"
    assert load_file(trace / "param_grads.safetensors")[EXPERT.format(3)][0, 0] == 60
    assert f"m/{EXPERT.format(2)}" in json.loads((trace / "optimizer.json").read_text())
    assert len(json.loads((trace / "after_step1.json").read_text())["params"]) == 5
    assert load_file(trace / "forward.safetensors")["logits"][0] == 0
    assert load_file(trace / "rank00001/forward.safetensors")["logits"][0] == 1
    assert "rank" not in json.loads((tmp_path / "whole/bundle.json").read_text())


def test_one_rank_alone_is_no_bundle(ranks):
    with pytest.raises(UserError, match="align merge"):
        load_bundle(ranks[0])


def _drifted(ranks):
    shutil.rmtree(ranks[1])
    write_rank(ranks[1], 1, {"decoder.final_layernorm.weight": np.array([0, 1, 2, 3.0000002], np.float32)})


def _other_model(ranks):
    described = json.loads((ranks[1] / "bundle.json").read_text())
    described["model"]["hidden_size"] += 2
    (ranks[1] / "bundle.json").write_text(json.dumps(described))


def _other_norm(ranks):
    path = ranks[1] / "losses.jsonl"
    path.write_text(path.read_text().replace('"grad_norm": "1.5', '"grad_norm": "1.6'))


REFUSED = {
    "a dense tensor that drifted": (_drifted, "decoder.final_layernorm.weight differs"),
    "another model": (_other_model, "model differs"),
    "another gradient norm": (_other_norm, "gradient norm of rank 1"),
    "a rank that is missing": (lambda ranks: ranks.pop(), "rank 1 is missing"),
    "a rank given twice": (lambda ranks: ranks.append(ranks[0]), "given twice"),
    "no tokens": (lambda ranks: (ranks[0] / "tokens.npy").unlink(), "capture this rank again"),
    "no such folder": (lambda ranks: ranks.append(ranks[0].with_name("nope")), "nope"),
    "a cut log": (lambda ranks: (ranks[1] / "losses.jsonl").write_text('{"step": 1, "mic'), "capture this rank again"),
    "cut weights": (lambda ranks: (ranks[1] / "init.safetensors").write_bytes(b"12"), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(align, ranks, tmp_path, case):
    spoil, says = REFUSED[case]
    spoil(ranks)
    result = align("merge", *ranks, "--out", "whole")
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1 and says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_tensor_parallel_pieces_are_joined(tmp_path):
    rows, gated = np.arange(12.0).reshape(4, 3), np.arange(8.0).reshape(8, 1)
    head, gate = "output_layer.weight", "decoder.layers.0.mlp.shared_experts.linear_fc1.weight"
    names = {head: 0, gate: 0}

    def held_by(r):
        halves = np.concatenate([gated[2 * r : 2 * r + 2], gated[4 + 2 * r : 6 + 2 * r]])
        return {head: rows[2 * r : 2 * r + 2], gate: halves, "norm.weight": np.ones(2)}

    pieces = [held_by(0), held_by(1)]
    holders = [Holder(tmp_path / str(r), r, 0, names) for r in range(2)]
    whole = unify(holders, pieces)
    np.testing.assert_array_equal(whole[head], rows)
    np.testing.assert_array_equal(whole[gate], gated)
    pieces[1]["norm.weight"] = np.array([1.0, 2.0])
    with pytest.raises(UserError, match=r"norm\.weight"):
        unify(holders, pieces)
    assert join("linear_proj.weight", [rows[:, :1], rows[:, 1:]], 1).tolist() == rows.tolist()


def test_equal_means_equal_bits():
    assert same_bits(np.array([np.nan]), np.array([np.nan])) and not same_bits(np.array([0.0]), np.array([-0.0]))


def test_names_both_ways():
    grouped, own = (
        "decoder.layers.1.mlp.experts.linear_fc1.weight3",
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
    )
    assert from_megatron(grouped) == own == from_megatron(own)
    assert to_megatron(own, grouped_experts=True) == grouped and to_megatron(own) == own
    dense = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    assert from_megatron(dense) == dense == to_megatron(dense, True)
    assert (
        expert_index(own) == 3
        and expert_index(dense) is None
        and with_expert(own, 7).endswith("experts.7.linear_fc1.weight")
    )
