"""Control tokens, kept apart from text: what a template wrote is never confused with what a user wrote."""

from __future__ import annotations

import re


class Control(str):
    """A control token of the template. Text of messages is plain ``str`` and stays text, whatever it spells."""

    __slots__ = ()


BOS = Control("<｜begin▁of▁sentence｜>")
EOS = Control("<｜end▁of▁sentence｜>")
USER = Control("<｜User｜>")
ASSISTANT = Control("<｜Assistant｜>")
LATEST_REMINDER = Control("<｜latest_reminder｜>")
THINK = Control("<think>")
END_THINK = Control("</think>")
DSML = Control("｜DSML｜")

TASKS = {name: Control(f"<｜{name}｜>") for name in ("query", "authority", "title", "read_url", "action", "domain")}

CONTROLS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())

Pieces = list[str]  # in order; an element is a Control or a stretch of text

_ANY_CONTROL = re.compile(f"({'|'.join(map(re.escape, CONTROLS))})")


def mark_controls(template: str) -> Pieces:
    """The pieces of a text of ours, its control tokens marked as such. Never call this on a user's text."""
    parts = _ANY_CONTROL.split(template)  # text and token by turns
    return [Control(part) if index % 2 else part for index, part in enumerate(parts) if part]


def segments(pieces: Pieces) -> Pieces:
    """The same pieces with neighbouring texts joined and empty ones left out."""
    joined: Pieces = []
    text: list[str] = []
    for piece in pieces:
        if not isinstance(piece, Control):
            text.append(piece)
            continue
        if any(text):
            joined.append("".join(text))
        text = []
        joined.append(piece)
    if any(text):
        joined.append("".join(text))
    return joined
