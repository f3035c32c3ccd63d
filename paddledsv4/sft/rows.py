"""Conversations on disk: rows of a .jsonl or .parquet file, one by one, and what a row must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from paddledsv4.errors import UserError
from paddledsv4.sft.render import MODES, list_text
from paddledsv4.sft.tools import to_json

ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
TEXTS = ("content", "reasoning_content", "task", "tool_call_id")
PARQUET_BATCH = 256  # rows


class InvalidRow(Exception):
    """Why a row cannot be trained on, without its place."""


class RawRow(NamedTuple):
    """A row as it was read: its number from 1 (the line of a .jsonl), what it holds, and its share of the progress."""

    number: int
    payload: bytes | Mapping[str, Any]
    size: int


class Conversation(NamedTuple):
    """A checked row."""

    messages: list[dict[str, Any]]
    thinking_mode: str | None  # of this row alone


class RowFile:
    """A file of conversations, read as a stream; iterating again starts again.

    Raises:
        UserError: no such file, another format, not readable, or pyarrow is missing for .parquet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        readers = {".jsonl": self._jsonl, ".parquet": self._parquet}
        if self.path.suffix not in readers:
            raise UserError(f"{str(path)!r}: must be a .jsonl or a .parquet file")
        if not self.path.is_file():
            raise UserError(f"{str(path)!r}: there is no such file")
        if self.path.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise UserError(f'{str(path)!r}: reading .parquet needs pyarrow: pip install "paddledsv4[parquet]"')
        self._read = readers[self.path.suffix]

    @property
    def size(self) -> int:
        """What the ``size`` of all rows adds up to: bytes of a .jsonl, rows of a .parquet."""
        return self.path.stat().st_size if self.path.suffix == ".jsonl" else self._open_parquet().metadata.num_rows

    def __iter__(self) -> Iterator[RawRow]:
        try:
            yield from self._read()
        except OSError as error:
            raise UserError(f"{str(self.path)!r}: cannot be read ({error})") from None

    def _jsonl(self) -> Iterator[RawRow]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield RawRow(number, line, len(line))

    def _parquet(self) -> Iterator[RawRow]:
        number, batches = 0, self._open_parquet().iter_batches(batch_size=PARQUET_BATCH)
        while rows := self._readable(lambda: next((batch.to_pylist() for batch in batches), [])):
            for row in rows:
                number += 1
                yield RawRow(number, row, 1)

    def _open_parquet(self):
        import pyarrow.parquet

        return self._readable(lambda: pyarrow.parquet.ParquetFile(self.path))

    def _readable(self, action: Callable[[], Any]) -> Any:
        """What the action gives, or that the file is damaged; text that is no UTF-8 is a ValueError."""
        import pyarrow

        try:
            return action()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(f"{str(self.path)!r}: is not a readable .parquet file ({what})") from None


def conversation(payload: bytes | Mapping[str, Any]) -> Conversation:
    """Check a row: ``messages``, and optionally ``tools`` (a list or its JSON text) and ``thinking_mode``.

    Fields that are null count as absent. ``tools`` go to the system message, which is added where there is none.
    Contents that are lists of parts become texts; arguments of a call may be an object instead of its JSON text.

    Raises:
        InvalidRow: one clause on what is wrong.
    """
    try:
        row = json.loads(payload if isinstance(payload, bytes) else to_json(payload))
    except (ValueError, TypeError) as error:
        raise InvalidRow(f"is not JSON ({error})") from None
    except RecursionError:
        raise InvalidRow("is nested too deeply") from None
    if not isinstance(row, Mapping):
        raise InvalidRow("must be an object with messages")
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise InvalidRow("messages must be a list of at least one message")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    if not any(message["role"] == "assistant" for message in messages):
        raise InvalidRow("has no assistant message, so there is nothing to train")
    mode = row.get("thinking_mode")
    if mode is not None and mode not in MODES:
        raise InvalidRow(f"thinking_mode = {mode!r}: must be one of: {', '.join(MODES)}")
    return Conversation(_with_tools(messages, row.get("tools")), mode)


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRow(f"{where} must be an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRow(f"{where}.role = {role!r}: must be one of: {', '.join(ROLES)}")
    if "reasoning" in message:
        raise InvalidRow(f"{where}.reasoning is not read; rename it reasoning_content")
    if "content" not in message and role != "assistant":
        raise InvalidRow(f"{where}.content is missing")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], where)
    for key in TEXTS:
        if not isinstance(message.get(key, ""), str):
            raise InvalidRow(f"{where}.{key} must be a text")
    if message.get("step_loss_mask", 1) not in (0, 1):
        raise InvalidRow(f"{where}.step_loss_mask must be 0 or 1")
    if "tools" in message:
        message["tools"] = _tools(message["tools"], f"{where}.tools")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    return message


def _joined(parts: list[Any], where: str) -> str:
    if not all(isinstance(part, Mapping) for part in parts):
        raise InvalidRow(f"{where}.content must hold objects")
    try:
        return list_text(parts)
    except TypeError:
        raise InvalidRow(f"{where}.content has a text part whose text is no text") from None


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRow(f"{where} must be a list")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRow(f"{where} must be an object with a function")
    if not isinstance(function.get("name"), str):
        raise InvalidRow(f"{where}.function.name must be a text")
    if not isinstance(call.get("id") or function.get("id") or "", str):
        raise InvalidRow(f"{where}.id must be a text")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = to_json(arguments)
    if not isinstance(arguments, str):
        raise InvalidRow(f"{where}.function.arguments must be an object or its JSON text")
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InvalidRow(f"{where}.function.arguments must be the JSON text of an object")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InvalidRow(f"{where} is not JSON ({error})") from None
    if not isinstance(tools, list):
        raise InvalidRow(f"{where} must be a list")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise InvalidRow(f"{where}[{index}] must be an object with a function")
    return tools


def _with_tools(messages: list[dict[str, Any]], given: Any) -> list[dict[str, Any]]:
    tools: Sequence[Any] = _tools(given, "tools") if given is not None else []
    if not tools:
        return messages
    index = next((i for i, message in enumerate(messages) if message["role"] == "system"), None)
    if index is None:
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[index].get("tools"):
        raise InvalidRow(f"has tools of its own and messages[{index}].tools; keep one of them")
    return [m | {"tools": tools} if i == index else m for i, m in enumerate(messages)]
