"""The fixed texts that DeepSeek-V4 was trained with.

They are DeepSeek's, from the encoding in its model repository (MIT License, Copyright (c) DeepSeek), byte for byte:
another wording would be another prompt.
"""

from __future__ import annotations

from paddledsv4.errors import UserError

TOOLS_HEAD = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"

RESPONSE_FORMAT_HEAD = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

ABSOLUTE_MAXIMUM = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
BEYOND_MAXIMUM = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""

# What stands before the first message in thinking mode. The same word means another text in another ladder:
# "preview" is V4-Flash and V4-Pro of the preview, "0731" V4-Flash-0731 and V4-Pro-0813.
EFFORT_LADDERS: dict[str, dict[str | None, str]] = {
    "preview": {None: "", "high": "", "max": ABSOLUTE_MAXIMUM},
    "0731": {None: ABSOLUTE_MAXIMUM, "low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM},
}


def effort_ladder(name: str) -> dict[str | None, str]:
    """Reasoning effort -> prefix, for the checkpoint family ``name``.

    Raises:
        UserError: no ladder of that name.
    """
    if name not in EFFORT_LADDERS:
        raise UserError(f"effort_ladder = {name!r}: must be one of: {', '.join(EFFORT_LADDERS)}")
    return EFFORT_LADDERS[name]
