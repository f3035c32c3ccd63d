"""Conversations on disk: rows of a .jsonl or .parquet file, one by one, and what a row must be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from paddledsv4.errors import UserError
from paddledsv4.sft.render import MODES, list_text
from paddledsv4.sft.tools import to_json

ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
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
        number = 0
        for batch in self._open_parquet().iter_batches(batch_size=PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(number, row, 1)

    def _open_parquet(self):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{str(self.path)!r}: is not a readable .parquet file ({error})") from None


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
    _need(isinstance(row, Mapping), "must be an object with messages")
    given = row.get("messages")
    _need(isinstance(given, list) and given, "messages must be a list of at least one message")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    _need(any(m["role"] == "assistant" for m in messages), "has no assistant message, so there is nothing to train")
    mode = row.get("thinking_mode")
    _need(mode is None or mode in MODES, f"thinking_mode = {mode!r}: must be one of: {', '.join(MODES)}")
    return Conversation(_with_tools(messages, row.get("tools")), mode)


def _message(given: Any, where: str) -> dict[str, Any]:
    _need(isinstance(given, Mapping), f"{where} must be an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    _need(role in ROLES, f"{where}.role = {role!r}: must be one of: {', '.join(ROLES)}")
    _need("reasoning" not in message, f"{where}.reasoning is not read; rename it reasoning_content")
    _need("content" in message or role == "assistant", f"{where}.content is missing")
    if isinstance(message.get("content"), list):
        _need(all(isinstance(part, Mapping) for part in message["content"]), f"{where}.content must hold objects")
        try:
            message["content"] = list_text(message["content"])
        except TypeError:
            raise InvalidRow(f"{where}.content has a text part whose text is no text") from None
    for key in ("content", "reasoning_content", "task", "tool_call_id"):
        _need(isinstance(message.get(key, ""), str), f"{where}.{key} must be a text")
    _need(message.get("step_loss_mask", 1) in (0, 1), f"{where}.step_loss_mask must be 0 or 1")
    if "tools" in message:
        message["tools"] = _tools(message["tools"], f"{where}.tools")
    if "tool_calls" in message:
        _need(isinstance(message["tool_calls"], list), f"{where}.tool_calls must be a list")
        calls = enumerate(message["tool_calls"])
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in calls]
    return message


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    _need(isinstance(function, Mapping), f"{where} must be an object with a function")
    _need(isinstance(function.get("name"), str), f"{where}.function.name must be a text")
    _need(isinstance(call.get("id") or function.get("id") or "", str), f"{where}.id must be a text")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = to_json(arguments)
    _need(isinstance(arguments, str), f"{where}.function.arguments must be an object or its JSON text")
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    _need(is_object, f"{where}.function.arguments must be the JSON text of an object")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InvalidRow(f"{where} is not JSON ({error})") from None
    _need(isinstance(tools, list), f"{where} must be a list")
    for index, tool in enumerate(tools):
        is_tool = isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
        _need(is_tool, f"{where}[{index}] must be an object with a function")
    return tools


def _with_tools(messages: list[dict[str, Any]], given: Any) -> list[dict[str, Any]]:
    tools: Sequence[Any] = _tools(given, "tools") if given is not None else []
    if not tools:
        return messages
    index = next((i for i, message in enumerate(messages) if message["role"] == "system"), None)
    if index is None:
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    _need(not messages[index].get("tools"), f"has tools of its own and messages[{index}].tools; keep one of them")
    return [m | {"tools": tools} if i == index else m for i, m in enumerate(messages)]


def _need(holds: object, reason: str) -> None:
    if not holds:
        raise InvalidRow(reason)
