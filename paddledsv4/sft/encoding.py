"""DeepSeek-V4's chat format, both ways: :func:`encode_messages`, :func:`encode`, and the parser of completions.

The text and the errors are those of the model repository's encoder. :func:`encode` gives the ids that training needs
and cannot be fooled by what stands in a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddledsv4.sft.parse import parse_completion
from paddledsv4.sft.prepare import Message
from paddledsv4.sft.render import render
from paddledsv4.sft.tokenizer import ChatTokenizer, load_tokenizer


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    *,
    effort_ladder: str = "preview",
) -> str:
    """The text of a conversation, as the model repository's ``encoding_dsv4.py`` writes it, byte for byte.

    Args:
        messages: dicts with ``role`` (system, user, developer, assistant, tool, latest_reminder) and ``content``;
            further keys by role: ``tools`` and ``response_format`` (system, developer), ``reasoning_content``,
            ``tool_calls`` and ``wo_eos`` (assistant), ``tool_call_id`` (tool), ``task`` (user, assistant). Unchanged.
        thinking_mode: ``"chat"`` or ``"thinking"``.
        context: messages before these that were encoded earlier; they shape the text but are not part of it.
        drop_thinking: leave out the reasoning before the last user's turn. Has no effect when a message has tools.
        add_default_bos_token: begin with the begin-of-sentence token, unless there is a context.
        reasoning_effort: None or a step of the ladder; matters in thinking mode only.
        effort_ladder: ``"preview"`` (None, high, max: the preview's checkpoints) or ``"0731"`` (None, low, high, max:
            V4-Flash-0731 and V4-Pro-0813), where None and high already ask for the most that the preview knew.

    Raises:
        AssertionError: another thinking mode, effort or task, or a developer without content.
        NotImplementedError: another role.
        KeyError, TypeError, AttributeError: a tool or a call without its fields, content of a wrong type, arguments
            that are JSON but no object.
        UserError: another ladder.
    """
    return render(
        messages, thinking_mode, context, drop_thinking, add_default_bos_token, reasoning_effort, effort_ladder
    ).text


def encode(
    messages: Sequence[Message], thinking_mode: str, tokenizer: ChatTokenizer | None = None, **options: Any
) -> list[int]:
    """Token ids of ``encode_messages(messages, thinking_mode, **options)``; control tokens are the template's alone.

    A message that spells ``<｜Assistant｜>``, an end of sentence or any other added token is tokenised as the text it
    is: the tokenizer that reads messages knows no such token. For messages that spell none, these are the ids of the
    whole text.

    Args:
        tokenizer: what :func:`paddledsv4.sft.tokenizer.load_tokenizer` gives; None loads the default one.

    Raises:
        UserError: there is no tokenizer. And everything that :func:`encode_messages` raises.
    """
    return (tokenizer or load_tokenizer()).encode(render(messages, thinking_mode, **options).pieces)


def parse_message_from_completion_text(text: str, thinking_mode: str) -> dict[str, Any]:
    """The message that a completion stands for: ``role``, ``content``, ``reasoning_content``, ``tool_calls``.

    The inverse of rendering an assistant turn. ``text`` starts after ``<think>`` (thinking mode) or ``</think>`` (chat)
    and ends with the end-of-sentence token. Arguments of calls come back as JSON text in the order written; calls have
    no ids, since the text has none.

    Raises:
        AssertionError: no ``</think>`` in thinking mode, no end of sentence, text after it or after the tool calls, or
            a control token within content or reasoning.
        ValueError: malformed tool calls, or the same parameter twice.
    """
    return parse_completion(text, thinking_mode)
