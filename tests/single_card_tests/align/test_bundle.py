"""A malformed bundle ends in one UserError that names the file and what is wrong."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import SHIPPED, json_lines, make_bundle, write

from align.bundle import load_bundle, shipped_bundles
from align.losslog import loss_md5
from paddledsv4.errors import UserError


def test_the_shipped_bundle():
    bundle = load_bundle(SHIPPED)
    assert SHIPPED in shipped_bundles() and bundle.name == SHIPPED
    assert bundle.tokens.shape == (400, 257) and bundle.model.vocab_size == 512
    state = bundle.init()
    assert len(state) == 238 and {value.dtype.name for value in state.values()} == {"float32", "int32"}
    losses = bundle.losses()
    assert len(losses.main) == len(losses.mtp) == 200 and len(losses.grad_norms) == 100
    assert losses.final_weights_md5 == "d9191483dd9bea7bc5ba75a8e808592c"
    for series in (losses.main, losses.mtp):
        assert all(loss_md5(value) == series.md5(index) for index, value in enumerate(series.values))


def test_a_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    make_bundle(tmp_path / SHIPPED)
    monkeypatch.chdir(tmp_path)
    assert load_bundle(SHIPPED).training.steps == 2


def test_bf16_tensors_come_as_the_same_numbers(tmp_path):
    path = make_bundle(tmp_path / "b")
    numbers = np.array([1.0, -2.5, 0.15625], np.float32)
    data = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (path / "init.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    state = load_bundle(path).init()
    assert state["w"].dtype == np.float32 and np.array_equal(state["w"], numbers)


def _described(path, change):
    described = json.loads((path / "bundle.json").read_text())
    change(described)
    (path / "bundle.json").write_text(json.dumps(described))


def _tokens(path, change):
    np.save(path / "tokens.npy", change(np.load(path / "tokens.npy")))


def _cut(path, name, bytes_left):
    (path / name).write_bytes((path / name).read_bytes()[:bytes_left])


def _set_token(value):
    def change(tokens):
        tokens = tokens.astype(np.int64)
        tokens[3, 4] = value
        return tokens

    return change


MALFORMED = {
    "no bundle.json": (lambda p: (p / "bundle.json").unlink(), "bundle.json is missing"),
    "bad JSON": (lambda p: _cut(p, "bundle.json", 100), "bundle.json is not valid JSON"),
    "binary bundle.json": (lambda p: (p / "bundle.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "a list": (lambda p: (p / "bundle.json").write_text("[]"), "must hold a JSON object"),
    "other format": (
        lambda p: _described(p, lambda d: d.update(format=2)),
        "format is 2; this align reads format 1",
    ),
    "no format": (lambda p: _described(p, lambda d: d.pop("format")), "format is None"),
    "no model": (lambda p: _described(p, lambda d: d.pop("model")), "section 'model' is missing"),
    "model a list": (lambda p: _described(p, lambda d: d.update(model=[])), "model must be a JSON object"),
    "source a text": (
        lambda p: _described(p, lambda d: d.update(source="x")),
        "source must be a JSON object",
    ),
    "negative steps": (lambda p: _described(p, lambda d: d["training"].update(steps=-1)), "steps"),
    "unknown field": (lambda p: _described(p, lambda d: d["model"].update(hiden_size=1)), "hiden_size"),
    "name with slash": (lambda p: _described(p, lambda d: d.update(name="../x")), "plain name"),
    "no tokens": (lambda p: (p / "tokens.npy").unlink(), "tokens.npy is missing"),
    "truncated tokens": (lambda p: _cut(p, "tokens.npy", 140), "tokens.npy is truncated"),
    "empty tokens": (lambda p: _cut(p, "tokens.npy", 0), "tokens.npy is truncated"),
    "float tokens": (lambda p: _tokens(p, lambda t: t.astype(np.float32)), "must be integers"),
    "flat tokens": (lambda p: _tokens(p, np.ravel), "must be [rows, 9]"),
    "short rows": (lambda p: _tokens(p, lambda t: t[:, 1:]), "must be [rows, 9]"),
    "few rows": (lambda p: _tokens(p, lambda t: t[:-1]), "has 7 rows; 2 steps need 8"),
    "token too large": (lambda p: _tokens(p, _set_token(512)), "token id 512 at row 3, column 4"),
    "token negative": (lambda p: _tokens(p, _set_token(-1)), "token id -1 at row 3, column 4"),
    "pickled tokens": (lambda p: np.save(p / "tokens.npy", np.array([{}]), allow_pickle=True), "tokens.npy"),
    "no weights": (lambda p: (p / "init.safetensors").unlink(), "init.safetensors is missing"),
    "truncated weights": (lambda p: _cut(p, "init.safetensors", -4), "init.safetensors is truncated"),
    "empty weights": (lambda p: _cut(p, "init.safetensors", 0), "init.safetensors is truncated"),
    "NaN weights": (
        lambda p: save_file({"a": np.ones(2), "b": np.array([1, np.nan])}, p / "init.safetensors"),
        "tensor b holds NaN or Inf in 1 of 2",
    ),
    "Inf weights": (
        lambda p: save_file({"a": np.array([np.inf])}, p / "init.safetensors"),
        "tensor a holds NaN",
    ),
    "no losses": (lambda p: (p / "losses.jsonl").unlink(), "losses.jsonl"),
    "truncated losses": (lambda p: _cut(p, "losses.jsonl", -30), "truncated"),
    "malformed loss": (
        lambda p: write(p / "losses.jsonl", ["x", *json_lines(2)]),
        "losses.jsonl:1: malformed",
    ),
    "few losses": (
        lambda p: write(p / "losses.jsonl", json_lines(1)),
        "2 main losses, but bundle.json promises 4",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    spoil, says = MALFORMED[case]
    path = make_bundle(tmp_path / "b")
    spoil(path)
    with pytest.raises(UserError) as error:
        bundle = load_bundle(path)
        bundle.init()
        bundle.losses()
    message = str(error.value)
    assert says in message and str(path) in message


def test_missing_directories_and_files(tmp_path):
    with pytest.raises(UserError, match="there is no bundle nope.*tiny-fp32"):
        load_bundle("nope")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; a bundle is a directory"):
        load_bundle(tmp_path / "file")
