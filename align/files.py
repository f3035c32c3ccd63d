"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from paddledsv4.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a hidden file beside it; an older file stays until the new one is complete.

    Raises:
        UserError: it cannot be written.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; choose another --out")
        hidden.write_text(text, encoding="utf-8")
        os.replace(hidden, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    finally:
        hidden.unlink(missing_ok=True) if hidden.is_file() else None
