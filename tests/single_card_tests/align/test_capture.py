"""align capture: what it writes, and that recording changes no bit of the run."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_bundle import make_small_bundle
from typer.testing import CliRunner

from align.bundle import load_bundle
from align.capture.choices import causal, margins, summary
from align.capture.selection import Selection, numbers
from align.capture.store import Folder
from align.cli import app
from align.hashing import tensor_md5
from align.tensors import read_tensors
from paddledsv4.errors import UserError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def lines(path):
    return [line for line in map(json.loads, path.read_text().splitlines()) if "run" not in line]


def test_a_captured_run_has_the_losses_of_a_plain_one(align, bundle, tmp_path):
    """Every MD5 of a loss, gradient norm and the final weights; another preset shows that the comparison can fail."""
    result = align("capture", bundle, "--numerics", "paddle", "--steps", "1-3", "--microbatches", "0,1", "--out", "c")
    assert result.exit_code == 0, result.stderr
    assert "a traced step took" in result.stderr and "capturing" in result.stderr
    assert lines(tmp_path / "c/losses.jsonl") == lines(bundle / "losses.jsonl")
    other = align("capture", bundle, "--numerics", "megatron", "--steps", 3, "--what", "choices", "--out", "m")
    assert other.exit_code == 0
    assert lines(tmp_path / "m/losses.jsonl") != lines(bundle / "losses.jsonl")


def test_a_captured_run_is_a_bundle(align, bundle, tmp_path):
    assert align("capture", bundle, "--numerics", "paddle", "--steps", 2, "--out", "deep/c").exit_code == 0
    captured = load_bundle(tmp_path / "deep/c")
    assert captured.name == "c" and captured.training.steps == 2 and captured.source["captured_from"] == "small"
    assert len(captured.source["capture"]["capture_seconds"]) == 2
    assert align("run", "deep/c", "--numerics", "paddle").exit_code == 0
    assert align("compare", bundle, "deep/c", "--steps", 2).exit_code == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c"]


def test_files_hold_what_the_json_says(align, bundle, tmp_path):
    assert align("capture", bundle, "--steps", "1,2", "--microbatches", "0,1", "--out", "c").exit_code == 0
    trace = tmp_path / "c/trace"
    assert {p.name for p in trace.iterdir() if p.is_dir()} == {
        "step000001-mb1", "step000002", "step000002-mb0", "step000002-mb1"
    }  # fmt: skip
    for file in trace.rglob("*.safetensors"):
        tensors, told = load_file(file), json.loads(file.with_suffix(".json").read_text())
        for name, tensor in tensors.items():
            if "@margin" in name:
                continue
            md5 = told[name]["md5"] if file.stem == "choices" else told[name][2]
            assert md5 == tensor_md5(tensor), (file, name)
        assert file.stem == "choices" or list(map(len, told.values())) == [4 if "grads" in file.stem else 3] * len(told)
    forward = json.loads((trace / "forward.json").read_text())
    assert forward["embedding.out"][:2] == [[24, 2, 16], "torch.float32"] and "logits#2" in forward
    assert forward["main_loss_mean"][2] == lines(bundle / "losses.jsonl")[0]["main_md5"]
    assert (
        forward["embedding.out"][2]
        != json.loads((trace / "step000001-mb1/forward.json").read_text())["embedding.out"][2]
    )
    assert (trace / "step000002/after_step2.json").is_file()


def test_gradients_and_state_are_those_of_the_step(align, bundle, tmp_path):
    """AdamW's first step by hand: m = (1 - beta1) g and v = (1 - beta2) g^2 of the clipped gradient."""
    assert align("capture", bundle, "--numerics", "paddle", "--out", "c").exit_code == 0
    gradients, state = (
        load_file(tmp_path / "c/trace/param_grads.safetensors"),
        load_file(tmp_path / "c/trace/optimizer.safetensors"),
    )
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    assert norm == pytest.approx(float(lines(bundle / "losses.jsonl")[2]["grad_norm"]), rel=1e-5)
    clip = min(1.0, 1.0 / (norm + 1e-6))
    assert len(state) == 3 * len(gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(state[f"m/{name}"], 0.1 * clip * gradient, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(state[f"v/{name}"], 0.05 * (clip * gradient) ** 2, rtol=1e-4, atol=1e-12)
    after = json.loads((tmp_path / "c/trace/after_step1.json").read_text())
    assert {n: tensor_md5(state[f"master/{n}"]) for n in gradients} == after["params"]


def test_choices_and_their_margins(align, bundle, tmp_path):
    assert align("capture", bundle, "--numerics", "paddle", "--what", "choices", "--out", "c").exit_code == 0
    assert {p.name for p in (tmp_path / "c/trace").iterdir()} == {
        "choices.json", "choices.safetensors", "after_step1.json"
    }  # fmt: skip
    tensors, told = (
        load_file(tmp_path / "c/trace/choices.safetensors"),
        json.loads((tmp_path / "c/trace/choices.json").read_text()),
    )
    assert told["decoder.layers.0.mlp.router.map"]["margin"] == "none: looked up in a table"
    learned = told["decoder.layers.1.mlp.router.map"]["margin"]
    assert learned["tokens"] == 48 and learned["min"] == tensors["decoder.layers.1.mlp.router.map@margin"].min() > 0
    indexer = tensors["decoder.layers.0.self_attention.indexer.topk@margin"]
    assert indexer.shape == (2, 24) and np.isinf(indexer[:, :11]).all() and np.isfinite(indexer[:, 11:]).all()


def test_globs_and_kinds_limit_what_is_written(align, bundle, tmp_path):
    words = ["capture", bundle, "--names", "decoder.layers.0.*", "--names", "output_layer.weight"]
    assert align(*words, "--what", "forward,param_grads", "--out", "c").exit_code == 0
    trace = tmp_path / "c/trace"
    assert {p.stem for p in trace.iterdir()} == {"forward", "param_grads", "after_step1"}
    assert all(n.startswith("decoder.layers.0.") for n in json.loads((trace / "forward.json").read_text()))
    parameters = json.loads((trace / "param_grads.json").read_text())
    assert "output_layer.weight" in parameters and "embedding.word_embeddings.weight" not in parameters


REFUSED = {
    "glob": (["--names", "decoder.layers.7.*"], "matches nothing"),
    "second glob": (["--names", "*", "--names", "nope"], "--names nope: matches nothing"),
    "step": (["--steps", "4"], "records steps 1 to 3"),
    "step 0": (["--steps", "0"], "count from 1"),
    "no number": (["--steps", "1,x"], "--steps 1,x"),
    "backwards": (["--steps", "3-1"], "--steps 3-1"),
    "microbatch": (["--microbatches", "2"], "microbatches 0 to 1"),
    "rank": (["--ranks", "0,1"], "one rank so far"),
    "kind": (["--what", "forward,weights"], "--what weights"),
    "preset": (["--numerics", "nope"], "nope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_one_line_and_leaves_nothing(align, bundle, tmp_path, case):
    words, says = REFUSED[case]
    result = align("capture", bundle, "--out", "c", *words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert [says in line for line in result.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_stays_as_it_is(align, bundle, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine").write_text("mine")
    result = align("capture", bundle, "--out", "c")
    assert result.exit_code == 2 and "there already" in result.stderr
    assert [p.name for p in tmp_path.rglob("*")] == ["c", "mine"]


def test_an_interrupt_leaves_nothing(align, bundle, tmp_path, monkeypatch):
    from align.capture.recorder import Recorder

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "end_step", interrupted)
    assert align("capture", bundle, "--out", "c").exit_code == 130
    assert not list(tmp_path.iterdir())


def test_margins():
    scores = np.array([[4.0, 1, 3, 2], [1, 1, 1, 1], [5, -np.inf, -np.inf, -np.inf], [5, 2, np.nan, 1]])
    assert np.array_equal(margins(scores, 2), np.array([1, 0, np.inf, np.nan], np.float32), equal_nan=True)
    assert np.isinf(margins(scores, 4)).all()
    assert summary(margins(scores, 2)) | {"below": 0} == {
        "tokens": 3,
        "undecided": 1,
        "nan": 1,
        "min": pytest.approx(np.nan, nan_ok=True),
        "below": 0,
    }
    seen = np.isfinite(causal(np.zeros((1, 8, 2)), 4))[0]
    assert seen.sum(1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2]


def test_selection_of_numbers_and_names():
    assert numbers("3,1-2", "--steps") == (1, 2, 3)
    for bad in ("", "1,", "-1", "1-", "1.5", "1-99999999"):
        with pytest.raises(UserError, match="--steps"):
            numbers(bad, "--steps")
    selection = Selection(names=("a.*", "b"))
    assert [selection.wants(n) for n in ("a.b.c", "a.b#2", "b", "b.c", "xa.b")] == [True, True, True, False, False]


def test_a_folder_writes_every_dtype(tmp_path):
    tensors = {"bits": np.array([0x3F80, 0xC000], np.uint16), "flag": np.array([True]), "count": np.array(3),
               "empty": np.zeros((0, 4), np.float32), "turned": np.arange(6.0).reshape(2, 3).T}  # fmt: skip
    with Folder(tmp_path / "c") as folder:
        folder.tensors("trace/forward", tensors, norms=True)
    back = read_tensors(tmp_path / "c/trace/forward.safetensors")
    assert back["bits"].tolist() == [1.0, -2.0] and back["flag"].tolist() == [True] and back["empty"].shape == (0, 4)
    np.testing.assert_array_equal(back["turned"], tensors["turned"])
    told = json.loads((tmp_path / "c/trace/forward.json").read_text())
    assert told["bits"][:2] == [[2], "torch.bfloat16"] and told["bits"][3] == pytest.approx(5**0.5)
