"""What else than ``metrics.jsonl`` metrics can be written as."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from paddledsv4.errors import UserError

NEED_A_PACKAGE = ("tensorboard", "visualdl")  # of the same name as the format, and as the extra that installs it


def check_installed(formats: Iterable[str]) -> None:
    """Whether the packages that write these formats are there.

    Raises:
        UserError: one is not.
    """
    for name in formats:
        if name in NEED_A_PACKAGE and importlib.util.find_spec(name) is None:
            raise UserError(
                f'metrics in the format {name} need the package {name}, which is not installed: '
                f'pip install "paddledsv4[{name}]"'
            )
