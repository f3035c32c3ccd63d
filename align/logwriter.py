"""Write losses.jsonl so that it is either complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from typing_extensions import Self

from align.losslog import loss_md5, loss_text
from paddledsv4.errors import UserError


class LossLogWriter:
    """Appends to a hidden file beside ``path`` and renames it to ``path`` when the ``with`` block ends well.

    When the block raises, the hidden file goes away, and so do the directories that were made for it: an
    older log at ``path`` stays as it was.

    Raises:
        UserError: the directory cannot be made or written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self._hidden = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self._header = header
        self._made: list[Path] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        directory = self.path.parent
        self._made = [d for d in (directory, *directory.parents) if not d.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise UserError(f"{self.path} is a directory; choose another --out")
            self._file = open(self._hidden, "w", encoding="utf-8")
            self._write({"run": self._header})
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --out") from None
            raise
        return self

    def losses(self, step: int, microbatch: int, rank: int, main: float, mtp: float | None) -> None:
        """Record the losses of one microbatch on one rank: floats that hold the float32 or float64 value."""
        entry = {
            "step": step,
            "microbatch": microbatch,
            "rank": rank,
            "main_loss": loss_text(main),
            "main_md5": loss_md5(main),
        }
        if mtp is not None:
            entry |= {"mtp_loss": loss_text(mtp), "mtp_md5": loss_md5(mtp)}
        self._write(entry)

    def grad_norm(self, step: int, norm: float) -> None:
        """Record the gradient norm of a step, before clipping."""
        self._write({"step": step, "grad_norm": loss_text(norm)})

    def final_weights(self, md5: str) -> None:
        """Record the MD5 of the trained parameters."""
        self._write({"final_weights_md5": md5})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._hidden, self.path)
        except OSError as failure:
            self._discard()
            raise UserError(f"cannot write {self.path}: {failure.strerror}") from None
        if kind is not None:
            self._discard()

    def _discard(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # a full disk refuses the last flush too; the file is removed anyway
        for remove in (self._hidden.unlink, *(directory.rmdir for directory in self._made)):
            try:
                remove()
            except OSError:
                continue  # it was never made, or someone else uses it
