"""Which tokens are trained: golden masks, borders, and conversations without an assistant."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_cases import cases, conversations, needs_tokenizer, safe_text, tokenizer

from paddledsv4.errors import UserError
from paddledsv4.sft.loss_mask import TRAIN_ON, multi_turn_loss_mask, offsets_mask, segments_mask, trained_spans
from paddledsv4.sft.render import render

pytestmark = needs_tokenizer
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]  # fmt: skip


@pytest.mark.parametrize("case", cases("loss_mask_cases", "cases"))
@pytest.mark.filterwarnings("ignore:tools= is not rendered")
def test_golden(case):
    drop = case["drop_thinking"] == "1"
    if "error" in case:
        with pytest.raises(ValueError, match="must be 'chat' or 'thinking', got 'auto'"):
            multi_turn_loss_mask(case["messages"], tokenizer(), case["thinking_mode"], drop, case["tools"])
        return
    result = multi_turn_loss_mask(case["messages"], tokenizer(), case["thinking_mode"], drop, case["tools"])
    token_ids, loss_mask = result
    assert (token_ids, loss_mask) == (case["token_ids"], case["loss_mask"])
    assert [result.response_length] == case["response_lengths"]
    rendered = render(case["messages"], case["thinking_mode"], drop_thinking=drop)
    assert rendered.text == case["text"]
    assert rendered.text == "".join(rendered.text[start:end] for start, end in [(0, 21), *rendered.spans])
    assert trained_runs(token_ids, loss_mask) == case["trained_segments"]


def trained_runs(token_ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the stretches of trained tokens."""
    runs, last = [], 0
    for token, trained in zip(token_ids, mask, strict=True):
        if trained:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = trained
    return [tokenizer().whole.decode(run, skip_special_tokens=False) for run in runs]


def test_a_step_is_left_out():
    messages = [m | {"step_loss_mask": 0} if m["content"] == "a1" else m for m in CHAT]
    assert trained_runs(*multi_turn_loss_mask(messages)) == ["a2<｜end▁of▁sentence｜>"]


def test_a_tokenizer_of_the_library_will_do():
    assert multi_turn_loss_mask(CHAT, tokenizer().whole) == multi_turn_loss_mask(CHAT)


def test_all_but_system():
    [run] = trained_runs(*multi_turn_loss_mask(CHAT, train_on="all-but-system"))
    assert run == render(CHAT, "chat").text.removeprefix("<｜begin▁of▁sentence｜>S")
    with pytest.raises(UserError, match="all-but-system"):
        multi_turn_loss_mask(CHAT, train_on="user")


def test_without_an_assistant_nothing_is_trained():
    result = multi_turn_loss_mask(CHAT[:2])
    assert result.loss_mask == [0] * len(result.token_ids) and len(result.token_ids) > 0
    assert result.response_length == 0 and result.response_mask == []
    assert result.loss_mask[-0:] != []  # the trap
    assert multi_turn_loss_mask(CHAT).response_mask == multi_turn_loss_mask(CHAT).loss_mask[7:]


def test_a_token_across_a_border_is_not_trained():
    """A reminder's text and the assistant's after it may become one token."""
    messages = [{"role": "latest_reminder", "content": "R"}, {"role": "assistant", "content": "yo"}]
    token_ids, mask = multi_turn_loss_mask(messages)
    assert trained_runs(token_ids, mask) == ["yo<｜end▁of▁sentence｜>"]
    messages = [{"role": "latest_reminder", "content": "hel"}, {"role": "assistant", "content": "lo"}]
    token_ids, mask = multi_turn_loss_mask(messages)
    assert trained_runs(token_ids, mask) == ["<｜end▁of▁sentence｜>"]


def test_tools_are_not_rendered_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="system message"):
        assert multi_turn_loss_mask(CHAT, tools=[{"function": {}}]) == multi_turn_loss_mask(CHAT)


def splits(offsets, mask, spans) -> bool:
    """Does a trained token reach beyond its turn, an untrained one lie within one, or a character lie on both sides?"""
    trained_characters = {c for (s, e), m in zip(offsets, mask, strict=True) if m for c in range(s, e)}
    other_characters = {c for (s, e), m in zip(offsets, mask, strict=True) if not m for c in range(s, e)}
    turn_of = {c: turn for turn, (start, end) in enumerate(spans) for c in range(start, end)}
    for (s, e), trained in zip(offsets, mask, strict=True):
        turns = {turn_of.get(c) for c in range(s, e)}
        if trained != (len(turns) == 1 and None not in turns):
            return True
    return bool(trained_characters & other_characters)


@settings(deadline=None, max_examples=150)
@given(conversations(safe_text), st.sampled_from(["chat", "thinking"]), st.booleans(), st.sampled_from(TRAIN_ON))
def test_masks_never_split_a_token(messages, mode, drop, train_on):
    rendered = render(messages, mode, drop_thinking=drop)
    spans = trained_spans(rendered, train_on)
    encoding = tokenizer().whole.encode(rendered.text, add_special_tokens=False)
    mask = multi_turn_loss_mask(messages, tokenizer(), mode, drop, train_on=train_on).loss_mask
    assert not splits(encoding.offsets, mask, spans)
    assert list(segments_mask(tokenizer().encode_batch([rendered.pieces])[0], spans)) == mask


def test_a_planted_mask_is_seen():
    encoding = tokenizer().whole.encode("🙂 hello", add_special_tokens=False)
    assert not splits(encoding.offsets, offsets_mask(encoding.offsets, [(0, 1)]), [(0, 1)])
    mask = [int(s < 4) for s, _ in encoding.offsets]  # a token counts when it begins within the span
    assert splits(encoding.offsets, mask, [(0, 4)])
