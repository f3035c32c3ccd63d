"""Completions back to messages: golden cases, round trips, and what must not be accepted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_cases import cases

from paddledsv4.sft.encoding import encode_messages, parse_message_from_completion_text
from paddledsv4.sft.tokens import EOS

QUESTION = [{"role": "user", "content": "q"}]
WHOLE = (
    'r</think>c\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>' + EOS
)


@pytest.mark.parametrize("case", cases("encoding_cases", "parse_cases"))
def test_official(case):
    if "error" in case:
        with pytest.raises(Exception) as error:
            parse_message_from_completion_text(case["text"], case["thinking_mode"])
        assert (type(error.value).__name__, str(error.value)) == (case["error"], case["error_text"])
    else:
        assert parse_message_from_completion_text(case["text"], case["thinking_mode"]) == case["parsed"]


def completion(message: dict, mode: str) -> str:
    """What the model must write to say ``message``."""
    prompt = encode_messages(QUESTION, mode)
    whole = encode_messages([*QUESTION, message], mode)
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


# anything but the bar of control tokens and think tags, which the format cannot quote
text = st.text(st.characters(codec="utf-8", exclude_characters="｜"), max_size=20).filter(lambda t: "think>" not in t)
name = st.text(st.characters(codec="utf-8", exclude_characters='｜"'), min_size=1, max_size=8)
value = st.recursive(
    text | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
call = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    },
    name,
    st.dictionaries(name, value, max_size=3),
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["chat", "thinking"]), text, text, st.lists(call, max_size=3))
def test_parse_inverts_render(mode, content, reasoning, calls):
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning if mode == "thinking" else "",
               "tool_calls": calls}  # fmt: skip
    assert parse_message_from_completion_text(completion(message, mode), mode) == message


TOOL_CASES = [p for p in cases("encoding_cases", "cases", "official_cases") if "tool_calls" in str(p.values[0])]


@pytest.mark.parametrize("tool_case", TOOL_CASES)
def test_assistants_of_the_tool_cases_survive(tool_case):
    assistants = [m for m in tool_case["messages"] if m["role"] == "assistant" and m.get("tool_calls")]
    for message in assistants:
        parsed = parse_message_from_completion_text(completion(message, "thinking"), "thinking")
        assert parsed["content"] == (message.get("content") or "")
        assert parsed["reasoning_content"] == message.get("reasoning_content", "")
        for ours, theirs in zip(parsed["tool_calls"], message["tool_calls"], strict=True):
            function = theirs["function"]
            try:
                expected = json.loads(function["arguments"])
            except ValueError:
                expected = {"arguments": function["arguments"]}
            assert (ours["function"]["name"], json.loads(ours["function"]["arguments"])) == (function["name"], expected)


@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
def test_a_cut_text_gives_no_other_call(cut):
    """Of a text that ends early, an error, or, as the official parser has it, the calls up to the last whole tag."""
    expected = parse_message_from_completion_text(WHOLE, "thinking")
    try:
        parsed = parse_message_from_completion_text(WHOLE[:cut], "thinking")
    except (AssertionError, ValueError):
        return
    assert parsed["tool_calls"] in ([], expected["tool_calls"]) or parsed["tool_calls"][0]["function"]["name"] == "f"
    assert (parsed["content"], parsed["reasoning_content"]) == ("c", "r")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("</think>", "", AssertionError),
        ("</think>c", "</think><think>c", AssertionError),
        (EOS, EOS + "x", AssertionError),
        (EOS, "x" + EOS, AssertionError),
        (' string="true"', "", ValueError),
        (' string="true"', ' string="maybe"', ValueError),
        ("tool_calls>\n", "tool_calls>", ValueError),
        ('name="f"', "name=f", ValueError),
        ("parameter>\n", "parameter>\n\n", ValueError),
    ],
)
def test_malformed(old, new, error):
    with pytest.raises(error):
        parse_message_from_completion_text(WHOLE.replace(old, new, 1), "thinking")
