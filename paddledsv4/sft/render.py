"""From prepared turns to pieces of text and control tokens, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from paddledsv4.sft.prepare import Message, drop_reasoning, fold_users, last_user_index, sort_tool_results
from paddledsv4.sft.prompts import effort_ladder as ladder_named
from paddledsv4.sft.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER, Pieces
from paddledsv4.sft.tools import instructions, tool_calls_block

MODES = ("chat", "thinking")


@dataclass(frozen=True)
class Turn:
    """One prepared message and everything it contributes, the opening of the next assistant turn included."""

    message: Message
    pieces: Pieces


@dataclass(frozen=True)
class Rendered:
    """A conversation: what stands before its turns, and the turns."""

    prefix: Pieces
    turns: list[Turn]

    @property
    def pieces(self) -> Pieces:
        """All pieces in order."""
        return self.prefix + [piece for turn in self.turns for piece in turn.pieces]

    @cached_property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters [start, end) of each turn."""
        lengths = [sum(map(len, pieces)) for pieces in (self.prefix, *(turn.pieces for turn in self.turns))]
        ends = list(accumulate(lengths))
        return list(zip(ends, ends[1:], strict=False))


def render(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    effort_ladder: str = "preview",
) -> Rendered:
    """See :func:`paddledsv4.sft.encoding.encode_messages`, which is the text of this."""
    ladder = ladder_named(effort_ladder)
    before = fold_users(context or [])
    folded = sort_tool_results(before + fold_users(messages))
    before, everything = folded[: len(before)], folded
    drops = drop_thinking and not any(message.get("tools") for message in everything)
    if thinking_mode == "thinking" and drops:
        # the context counts as it would be alone, a developer at its end included: so does the official encoder
        before, everything = drop_reasoning(before), drop_reasoning(everything)
    style = _Style(thinking_mode, drops, ladder, reasoning_effort)
    last_user = last_user_index(everything)
    turns = [style.turn(index, everything, last_user) for index in range(len(before), len(everything))]
    return Rendered([BOS] if add_default_bos_token and not context else [], turns)


@dataclass(frozen=True)
class _Style:
    """How turns are written."""

    thinking_mode: str
    drops: bool
    ladder: Mapping[str | None, str]
    effort: str | None

    @property
    def thinks(self) -> bool:
        return self.thinking_mode == "thinking"

    def turn(self, index: int, messages: Sequence[Message], last_user: int) -> Turn:
        """The turn at ``index`` of the prepared ``messages``, of which ``last_user`` is the last user's."""
        message = messages[index]
        _require(self.thinking_mode in MODES, f"Invalid thinking_mode `{self.thinking_mode}`")
        schemas = [tool["function"] for tool in message.get("tools") or []]
        calls = [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in message.get("tool_calls") or []
        ]
        _require(self.effort in self.ladder, f"Invalid reasoning effort: {self.effort}")
        pieces: Pieces = [self.ladder[self.effort]] if index == 0 and self.thinks else []

        role = message.get("role")
        if role == "system":
            pieces += [f"{message.get('content') or ''}", *instructions(schemas, message.get("response_format"))]
        elif role == "developer":
            _require(message.get("content"), f"Invalid message for role `{role}`: {message}")
            pieces += [USER, "" + message["content"], *instructions(schemas, message.get("response_format"))]
        elif role == "user":
            pieces += [USER, "\n\n".join(map(_block_text, message["blocks"]))]
        elif role == "latest_reminder":
            pieces += [LATEST_REMINDER, f"{message.get('content')}"]
        elif role == "assistant":
            answers_task = index > 0 and messages[index - 1].get("task") is not None
            if self.thinks and not answers_task and (not self.drops or index > last_user):
                pieces += [f"{message.get('reasoning_content') or ''}", END_THINK]
            pieces += [f"{message.get('content') or ''}", *(tool_calls_block(calls) if calls else [])]
            pieces += [] if message.get("wo_eos", False) else [EOS]
        else:
            raise NotImplementedError(f"Unknown role: {role}")

        following = messages[index + 1].get("role") if index + 1 < len(messages) else "assistant"
        if following in ("assistant", "latest_reminder"):
            pieces += self._transition(message, index >= last_user)
        return Turn(message, pieces)

    def _transition(self, message: Message, is_last_user: bool) -> Pieces:
        """What leads over to an assistant: a task's token, or the assistant's with thinking opened or closed."""
        task = message.get("task")
        if task is not None:
            _require(task in TASKS, f"Invalid task: '{task}'. Valid tasks are: {list(TASKS)}")
            opening = [ASSISTANT, THINK if self.thinks else END_THINK] if task == "action" else []
            return [*opening, TASKS[task]]
        if message.get("role") not in ("user", "developer"):
            return []
        opens = self.thinks and (not self.drops or is_last_user)
        return [ASSISTANT, THINK if opens else END_THINK]


def _block_text(block: Mapping[str, Any]) -> str:
    if block["type"] == "text":
        return block["text"]
    content = block["content"]
    if isinstance(content, list):
        content = list_text(content)
    return f"<tool_result>{content}</tool_result>"


def list_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """Content given as a list of parts: texts, and a placeholder for each part that is none."""
    return "\n\n".join(
        part.get("text", "") if part.get("type") == "text" else f"[Unsupported {part.get('type')}]" for part in parts
    )


def _require(holds: object, message: str) -> None:
    """The official encoder asserts; callers match on that, and it must survive ``python -O``."""
    if not holds:
        raise AssertionError(message)
