"""The fingerprint of the kernels that a run computes with, where this align knows how to take it."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def kernel_fingerprint(torch: ModuleType | None) -> dict[str, Any]:
    """The entry ``kernel_fingerprint`` of bundle.json's ``source``; none without torch or align/fingerprint.py."""
    try:
        from align.fingerprint import record
    except ImportError:
        return {}
    return {"kernel_fingerprint": record(torch)} if torch is not None else {}
