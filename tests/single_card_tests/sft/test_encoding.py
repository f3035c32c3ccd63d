"""The text of conversations, the ids of it, and that no message can forge a control token."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_cases import cases, conversations, hostile_text, needs_tokenizer, safe_text, tokenizer

from paddledsv4.errors import UserError
from paddledsv4.sft.encoding import encode, encode_messages
from paddledsv4.sft.render import render
from paddledsv4.sft.tokenizer import load_tokenizer
from paddledsv4.sft.tokens import BOS, CONTROLS, Control

OFFICIAL = cases("encoding_cases", "cases", "official_cases")
RECIPE = [p for p in cases("encoding_recipe_cases", "cases") if p.id not in ("json_object", "tool_choice_required")]


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_text(case):
    before = copy.deepcopy(case)
    if "error" in case:
        with pytest.raises(Exception) as error:
            encode_messages(case["messages"], **case["kwargs"])
        assert (type(error.value).__name__, str(error.value)) == (case["error"], case["error_text"])
    else:
        assert encode_messages(case["messages"], **case["kwargs"]) == case["rendered"]
    assert case == before  # the messages are the caller's


@needs_tokenizer
@pytest.mark.parametrize("case", [p for p in OFFICIAL if "token_ids" in p.values[0]])
def test_official_ids(case):
    assert encode(case["messages"], tokenizer=tokenizer(), **case["kwargs"]) == case["token_ids"]


def request(case: dict) -> dict:
    """The arguments that say what the body of a recipe case says."""
    body = case["body"]
    mode = {"enabled": "thinking", "disabled": "chat"}[body["thinking"]["type"]]
    return {"messages": body["messages"], "thinking_mode": mode, "reasoning_effort": body.get("reasoning_effort"),
            "effort_ladder": "0731"}  # fmt: skip


@pytest.mark.parametrize("case", RECIPE)
def test_newer_ladder(case):
    rendered, at, ranges = render(**request(case)), 0, []
    assert rendered.text == case["prompt"]
    for piece in rendered.pieces:
        if isinstance(piece, Control):
            ranges.append([at, at + len(piece)])
        at += len(piece)
    assert ranges == case["special_ranges"]


@needs_tokenizer
def test_injection_stays_text():
    [case] = [p.values[0] for p in RECIPE if p.id == "injection"]
    assert encode(**request(case)) == case["safe_token_ids"]
    assert tokenizer().whole.encode(case["prompt"], add_special_tokens=False).ids == case["naive_token_ids"]


def test_the_same_effort_means_another_text_in_another_ladder():
    user = [{"role": "user", "content": "q"}]
    preview = encode_messages(user, "thinking", reasoning_effort="max")
    newer = encode_messages(user, "thinking", reasoning_effort="max", effort_ladder="0731")
    assert "Absolute maximum" in preview and "Beyond maximum" in newer
    assert encode_messages(user, "thinking", effort_ladder="0731") == preview
    with pytest.raises(AssertionError, match="Invalid reasoning effort: low"):
        encode_messages(user, "thinking", reasoning_effort="low")
    with pytest.raises(UserError, match="preview, 0731"):
        encode_messages(user, "thinking", effort_ladder="v4")


@pytest.mark.parametrize(
    ("messages", "mode", "error"),
    [
        ([{"role": "developer", "content": ""}], "chat", AssertionError),
        ([{"role": "user", "content": "q"}], "auto", AssertionError),
        ([{"role": "user", "content": None}], "chat", TypeError),
        ([{"role": "system", "content": "", "tools": [{"name": "f"}]}], "chat", KeyError),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "1"}}]}], "chat", AttributeError),
    ],
)
def test_errors(messages, mode, error):
    with pytest.raises(error):
        encode_messages(messages, mode)


def test_developers_before_the_last_user_go_with_the_reasoning():
    messages = [{"role": "developer", "content": "D"}, {"role": "assistant", "content": "a", "reasoning_content": "r"},
                {"role": "user", "content": "q"}]  # fmt: skip
    assert encode_messages(messages, "thinking") == f"{BOS}a<｜end▁of▁sentence｜><｜User｜>q<｜Assistant｜><think>"
    assert "D<｜Assistant｜><think>r</think>a" in encode_messages(messages, "thinking", drop_thinking=False)
    with_tools = [*messages, {"role": "system", "content": "", "tools": [{"function": {}}]}]
    assert "D<｜Assistant｜><think>r</think>a" in encode_messages(with_tools, "thinking")


def replace_texts(value):
    """The same structure with "x" for every text that is not a key word of the format."""
    keep = {"role", "step_loss_mask", "wo_eos"}
    if isinstance(value, dict):
        return {k: v if k in keep else arguments(v) if k == "arguments" else replace_texts(v) for k, v in value.items()}
    if isinstance(value, list):
        return [replace_texts(v) for v in value]
    return "x" if isinstance(value, str) else value


def arguments(text: str) -> str:
    return json.dumps(replace_texts(json.loads(text)))


def control_ids(ids: list[int]) -> list[int]:
    return [i for i in ids if i <= 2 or i >= 128000]


@needs_tokenizer
@settings(deadline=None, max_examples=150)
@given(conversations(hostile_text), st.sampled_from(["chat", "thinking"]), st.booleans())
def test_no_message_forges_a_control_token(messages, mode, drop):
    ids = encode(messages, mode, drop_thinking=drop)
    assert control_ids(ids) == control_ids(encode(replace_texts(messages), mode, drop_thinking=drop))
    text = encode_messages(messages, mode, drop_thinking=drop)
    assert tokenizer().whole.decode(ids, skip_special_tokens=False) == text  # and nothing is lost


@needs_tokenizer
def test_every_added_token_can_be_text():
    added = [str(token) for token in tokenizer().whole.get_added_tokens_decoder().values()]
    assert len(added) == 1283
    for start in range(0, len(added), 100):
        ids = encode([{"role": "user", "content": " ".join(added[start : start + 100])}], "chat")
        assert control_ids(ids) == [0, 128803, 128804, 128822]
    naive = tokenizer().whole.encode(" ".join(added), add_special_tokens=False).ids
    assert len(control_ids(naive)) == 1283  # so the check above can fail


@needs_tokenizer
@settings(deadline=None, max_examples=100)
@given(conversations(safe_text), st.sampled_from(["chat", "thinking"]))
def test_without_forgery_the_ids_are_those_of_the_whole_text(messages, mode):
    text = encode_messages(messages, mode)
    assert encode(messages, mode) == tokenizer().whole.encode(text, add_special_tokens=False).ids


@needs_tokenizer
def test_ids_of_control_tokens():
    assert [tokenizer().control_ids[token] for token in CONTROLS] == [
        0, 1, 128803, 128804, 128828, 128821, 128822, 128825, 128830, 128831, 128836, 128845, 128829, 128832,
    ]  # fmt: skip


@needs_tokenizer
@pytest.mark.parametrize("content", ["no json", "{}", '{"added_tokens": []}', None])
def test_another_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(path)
