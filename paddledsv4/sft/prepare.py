"""From a conversation as people store it to the turns that the model knows: no tool role, no stale reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

KEPT_BEFORE_LAST_USER = {"user", "system", "tool", "latest_reminder", "direct_search_results"}
CARRIED_BY_USER = ("task", "wo_eos", "mask")


def fold_users(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Tool results and neighbouring users become the blocks of one user turn. A user with a task takes no more text."""
    folded: list[dict[str, Any]] = []
    for message in messages:
        role = message.get("role")
        if role not in ("user", "tool"):
            folded.append(dict(message))
            continue
        last = folded[-1] if folded and folded[-1].get("role") == "user" else None
        if role == "tool":
            block = {"type": "tool_result", "id": message.get("tool_call_id", "")}
            fresh: dict[str, Any] = {}
            block["content"] = message.get("content", "")
            joins = last is not None
        else:
            block = {"type": "text", "text": message.get("content", "")}
            fresh = {key: message[key] for key in CARRIED_BY_USER if key in message}
            joins = last is not None and last.get("task") is None
        if joins:
            last["blocks"].append(block)
        else:
            folded.append({"role": "user", "blocks": [block], **fresh})
    return folded


def sort_tool_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Within a user turn, results in the order of the latest calls; texts stay, unknown ids count as first."""
    order: dict[str, int] = {}
    ordered = []
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and calls:
            ids = [call.get("id") or call.get("function", {}).get("id", "") for call in calls]
            order = {name: index for index, name in enumerate(ids) if name}
        if message.get("role") == "user" and order:
            message = message | {"blocks": _results_in_order(message["blocks"], order)}
        ordered.append(message)
    return ordered


def _results_in_order(blocks: list[dict[str, Any]], order: Mapping[str, int]) -> list[dict[str, Any]]:
    results = [block for block in blocks if block["type"] == "tool_result"]
    following = iter(sorted(results, key=lambda block: order.get(block["id"], 0)))
    return [next(following) if block["type"] == "tool_result" else block for block in blocks]


def last_user_index(messages: Sequence[Message]) -> int:
    """Where the last user or developer speaks; -1 if none does."""
    return max((i for i, message in enumerate(messages) if message.get("role") in ("user", "developer")), default=-1)


def drop_reasoning(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before the last user: assistants without reasoning, and no developers (nor roles that nobody knows)."""
    last, kept = last_user_index(messages), []
    for index, message in enumerate(messages):
        if index >= last or message.get("role") in KEPT_BEFORE_LAST_USER:
            kept.append(message)
        elif message.get("role") == "assistant":
            kept.append({key: value for key, value in message.items() if key != "reasoning_content"})
    return kept
