"""Megatron's names, which are ours, but for experts: grouped ones have a spelling of their own.

``experts.local_experts.3.linear_fc1.weight`` is ours and that of sequential experts; grouped experts keep
``experts.linear_fc1.weight3``.
"""

from __future__ import annotations

import re

_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
BUFFERS = ("tid2eid", "expert_bias")  # last parts of the names of buffers that a checkpoint keeps


def from_megatron(name: str) -> str:
    """Our name of a parameter or buffer that some version of Megatron calls ``name``."""
    return _GROUPED.sub(r".experts.local_experts.\3.\1.\2", name)


def to_megatron(name: str, grouped_experts: bool = False) -> str:
    """Megatron's name of a parameter that we call ``name``; the two spellings differ for experts alone."""
    if not grouped_experts:
        return name
    return re.sub(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$", r".experts.\2.\3\1", name)


def expert_index(name: str) -> int | None:
    """Which routed expert a parameter belongs to; None: it is dense."""
    found = _EXPERT.search(name)
    return int(found[0]) if found else None


def with_expert(name: str, index: int) -> str:
    """The same parameter of the expert ``index``."""
    return _EXPERT.sub(str(index), name)
