"""Tools as the model reads and writes them: schemas in the prompt, calls in DSML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from paddledsv4.sft.prompts import RESPONSE_FORMAT_HEAD, TOOLS_HEAD, TOOLS_TAIL
from paddledsv4.sft.tokens import DSML, Pieces, mark_controls

_HEAD, _TAIL = mark_controls(TOOLS_HEAD), mark_controls(TOOLS_TAIL)


def to_json(value: Any) -> str:
    """JSON on one line, characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def instructions(schemas: Sequence[Any], response_format: Any) -> Pieces:
    """What follows a system or developer text: the tools, one schema a line, then the format of the response."""
    pieces: Pieces = []
    if schemas:
        pieces += ["\n\n", *_HEAD, "\n".join(map(to_json, schemas)), *_TAIL]
    if response_format:
        pieces += ["\n\n", RESPONSE_FORMAT_HEAD, to_json(response_format)]
    return pieces


def tool_calls_block(functions: Sequence[Mapping[str, Any]]) -> Pieces:
    """``functions``: name and arguments (JSON text) of each call, in order."""
    pieces: Pieces = ["\n\n<", DSML, "tool_calls>\n"]
    for number, function in enumerate(functions):
        pieces += ["\n" if number else "", "<", DSML, f'invoke name="{function["name"]}">\n']
        pieces += _parameters(function["arguments"])
        pieces += ["\n</", DSML, "invoke>"]
    return [*pieces, "\n</", DSML, "tool_calls>"]


def _parameters(arguments: Any) -> Pieces:
    """One line per argument: texts verbatim, everything else as JSON; what is not JSON is one text."""
    try:
        values = json.loads(arguments)
    except (ValueError, TypeError, RecursionError):
        values = {"arguments": arguments}
    pieces: Pieces = []
    for name, value in values.items():
        is_text = isinstance(value, str)
        flag = "true" if is_text else "false"
        pieces += ["\n" if pieces else "", "<", DSML, f'parameter name="{name}" string="{flag}">']
        pieces += [value if is_text else to_json(value), "</", DSML, "parameter>"]
    return pieces
