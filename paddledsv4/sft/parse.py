"""The strict reader of what the model wrote: one assistant turn, from its text back to a message.

It accepts what the official parser accepts and nothing more, with the same errors. Two leniencies are the official
one's as well: after tool calls the end of sentence may be missing, and a text that ends within a block of calls, after
a whole tag, gives the calls read so far.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from paddledsv4.sft.tokens import BOS, DSML, END_THINK, EOS, THINK
from paddledsv4.sft.tools import to_json

CALLS = f"\n\n<{DSML}tool_calls"
END_CALLS = f"</{DSML}tool_calls>"
INVOKE, END_INVOKE = f"<{DSML}invoke", f"</{DSML}invoke"
PARAMETER, END_PARAMETER = f"<{DSML}parameter", f"/{DSML}parameter"

TOOL_NAME = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)  # the second newline: a call without arguments
NAME_AND_VALUE = re.compile(r' name="(.*?)" string="(true|false)">(.*?)<\n?', re.DOTALL)


@dataclass
class _Reader:
    """A text and how far it has been read."""

    text: str
    at: int = 0

    @property
    def done(self) -> bool:
        return self.at == len(self.text)

    def until(self, *stops: str) -> tuple[str, str | None]:
        """What stands before the first of ``stops``, and which it was; the rest and None if there is none."""
        found = [(position, stop) for stop in stops if (position := self.text.find(stop, self.at)) >= 0]
        end, stop = min(found, default=(len(self.text), None), key=lambda place: place[0])
        passed = self.text[self.at : end]
        self.at = end + len(stop or "")
        return passed, stop


def parse_completion(text: str, thinking_mode: str) -> dict[str, Any]:
    """See :func:`paddledsv4.sft.encoding.parse_message_from_completion_text`."""
    reader, reasoning, calls = _Reader(text), "", []
    if thinking_mode == "thinking":
        reasoning, stop = reader.until(END_THINK, CALLS)
        _require(stop == END_THINK, "Invalid thinking format: missing </think>")
    content, stop = reader.until(EOS, CALLS)
    if stop == CALLS:
        calls = _read_calls(reader)
        after, _ = reader.until(EOS)
        _require(not after, "Unexpected content after tool calls")
    else:
        _require(stop == EOS, "Invalid format: missing EOS token")
    _require(reader.done, "Unexpected content at end")
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        _require(token not in content and token not in reasoning, f"Unexpected special token '{token}' in content")
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _read_calls(reader: _Reader) -> list[tuple[str, str]]:
    """Name and arguments (JSON) of each call up to the end of the block."""
    calls = []
    while not reader.done:
        before, stop = reader.until(INVOKE, END_CALLS)
        if before != ">\n":
            raise ValueError(f"Tool call format error: expected '>\\n' but got '{before}'")
        if stop == END_CALLS:
            break
        if stop is None:
            raise ValueError("Missing special token in tool calls")
        calls.append(_read_call(reader))
    return calls


def _read_call(reader: _Reader) -> tuple[str, str]:
    head, stop = reader.until(PARAMETER, END_INVOKE)
    named = TOOL_NAME.fullmatch(head)
    if not named:
        raise ValueError(f"Tool name format error: '{head}'")
    values: dict[str, str] = {}
    while stop == PARAMETER:
        body, _ = reader.until(END_PARAMETER)
        parameter = NAME_AND_VALUE.fullmatch(body)
        if not parameter:
            raise ValueError(f"Parameter format error: '{body}'")
        name, is_text, value = parameter.groups()
        if name in values:
            raise ValueError(f"Duplicate parameter name: '{name}'")
        values[name] = to_json(value) if is_text == "true" else value
        between, stop = reader.until(PARAMETER, END_INVOKE)
        if between != ">\n":
            raise ValueError(f"Parameter format error: expected '>\\n' but got '{between}'")
    return named[1], "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in values.items()) + "}"


def _require(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)
