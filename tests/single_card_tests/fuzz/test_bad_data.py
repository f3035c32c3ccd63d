"""Files of tokens, conversations and weights with anything in them: read, or refused in one line with their name."""

import io
import json

import numpy as np
import pytest
from fuzzing import EXAMPLES, change, damage, refusal, search
from hypothesis import strategies as st
from safetensors.numpy import save

from paddledsv4.sft.adapter import CONFIG, WEIGHTS, SavedAdapter
from paddledsv4.sft.rows import RowFile
from paddledsv4.training.data import load_tokens
from paddledsv4.weights.files import INDEX, Files, read_folder

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief.", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "reasoning_content": "Well.", "content": "It.", "step_loss_mask": 1,
         "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ],
    "thinking_mode": "thinking",
}  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TOKENS = st.sampled_from([npy(np.arange(99).reshape(9, 11)), npy(np.arange(99, dtype=np.uint16)), npy(np.zeros(()))])
DTYPES = st.sampled_from(["i8", "u1", ">i4", "f4", "c8", "?", "U3", "S2", "M8[s]", "m8[s]", "V4", "O", "i4,f4"])


@EXAMPLES
def test_spoilt_tokens(tmp_path, examples):
    def check(data, spoil, suffix):
        path = tmp_path / f"t{suffix}"
        path.write_bytes(spoil(data))
        said = refusal(load_tokens, path, 10, 100)
        assert said is None or str(path) in said

    search(examples, check, TOKENS, damage(), st.sampled_from([".npy", ".bin"]))


@EXAMPLES
def test_tables_of_any_kind(tmp_path, examples):
    def check(dtype, shape, fortran):
        order = "F" if fortran else "C"
        path = tmp_path / "t.npy"
        path.write_bytes(npy(np.zeros(shape, dtype, order=order)) if dtype != "O" else npy(np.full(shape, None)))
        said = refusal(load_tokens, path, 4, 100)
        assert said or (len(shape) < 3 and np.dtype(dtype).kind in "iu")

    search(examples, check, DTYPES, st.lists(st.integers(0, 9), max_size=4), st.booleans())


@pytest.mark.parametrize("header", ["{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 5)}",
                                    "{'descr': '<i8', 'fortran_order': False, 'shape': (-3, 5)}",
                                    "__import__('os').system('touch mark')", "(" * 3000])
def test_nasty_headers(tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    text = header.encode() + b"\n"
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 80)
    assert refusal(load_tokens, tmp_path / "t.npy", 4, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


# ---- conversations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="needs paddledsv4[sft]")
    from sft_runs import byte_tokenizer

    from paddledsv4.sft.dataset import ConversationConfig, read_documents

    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return lambda path, **options: read_documents(path, ConversationConfig(**options), tokenizer)


@EXAMPLES
def test_conversations_with_strange_values(tmp_path, encode, examples):
    def check(spoils, skip):
        row = CONVERSATION
        for spoil in spoils:
            row = spoil(row)
        (tmp_path / "a.jsonl").write_text(f"{json.dumps(CONVERSATION)}\n{json.dumps(row)}\n")
        said = refusal(encode, tmp_path / "a.jsonl", skip_invalid=skip)
        assert said is None or (not skip and "a.jsonl: row 2 " in said)

    search(examples, check, st.lists(change(), min_size=1, max_size=3), st.booleans())


@EXAMPLES
def test_spoilt_conversations(tmp_path, encode, examples):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Three."}]
    table = pyarrow.table({"messages": [row] * 3})
    parquet.write_table(table, tmp_path / "whole.parquet")
    whole = {
        ".jsonl": f"{json.dumps(CONVERSATION, ensure_ascii=False)}\n".encode() * 2,
        ".parquet": (tmp_path / "whole.parquet").read_bytes(),
    }

    def check(suffix, spoil):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(spoil(whole[suffix]))
        said = refusal(encode, path)
        assert said is None or path.name in said
        refusal(lambda: RowFile(path).size)

    search(examples, check, st.sampled_from(list(whole)), damage())


# ---- weights -------------------------------------------------------------------------------------------------------

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.zeros(3, np.int64)}


def read_all(path) -> None:
    with Files() as files:
        for stored in read_folder(path).values():
            files.read(stored)


@EXAMPLES
def test_spoilt_weights(tmp_path, examples):
    index = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model-1.safetensors")}

    def check(spoil, which):
        files = {"model-1.safetensors": save(TENSORS), INDEX: json.dumps(index).encode()}
        files[which] = spoil(files[which])
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        said = refusal(read_all, tmp_path)
        assert said is None or str(tmp_path) in said

    search(examples, check, damage(), st.sampled_from(["model-1.safetensors", INDEX]))


@EXAMPLES
def test_spoilt_adapters(tmp_path, examples):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["linear_proj"], "bias": "none"}
    whole = {WEIGHTS: save(TENSORS), CONFIG: json.dumps(config).encode()}

    def check(spoil, other, which):
        files = whole | {which: spoil(whole[which])}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        refusal(SavedAdapter.read, tmp_path)
        (tmp_path / CONFIG).write_text(json.dumps(other(config)))
        (tmp_path / WEIGHTS).write_bytes(whole[WEIGHTS])
        refusal(SavedAdapter.read, tmp_path)

    search(examples, check, damage(), change(), st.sampled_from(list(whole)))
