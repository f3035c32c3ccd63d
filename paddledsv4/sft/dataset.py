"""From a file of conversations to tokens and masks: streamed, in parallel, in the file's order whatever the workers."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.errors import UserError
from paddledsv4.sft.loss_mask import segments_mask, trained_spans
from paddledsv4.sft.progress import Advance, progress_bar
from paddledsv4.sft.prompts import effort_ladder
from paddledsv4.sft.render import Rendered, render
from paddledsv4.sft.rows import InvalidRow, RawRow, RowFile, conversation
from paddledsv4.sft.tokenizer import ChatTokenizer, load_tokenizer

CHUNK = 256  # rows that go to a worker at once
AHEAD = 3  # chunks per worker that may be under way, so that a large file is never read ahead of its use
THREADS = 2  # without workers


class ConversationConfig(StrictConfig):
    """How conversations become tokens.

    ``thinking_mode``: a row may name its own. ``max_tokens``: a longer conversation is invalid; None allows any.
    ``skip_invalid``: leave invalid rows out instead of stopping at the first.
    """

    SECTION: ClassVar[str] = "conversations."

    thinking_mode: Literal["chat", "thinking"] = "chat"
    drop_thinking: bool = False
    reasoning_effort: Literal["low", "high", "max"] | None = None
    effort_ladder: Literal["preview", "0731"] = "preview"
    train_on: Literal["assistant", "all-but-system"] = "assistant"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    skip_invalid: bool = False

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        steps = effort_ladder(self.effort_ladder)
        if self.reasoning_effort not in steps:
            known = ", ".join(step for step in steps if step)
            self.reject("reasoning_effort", f"must be one of: {known} (effort_ladder {self.effort_ladder})")
        return self


@dataclass(frozen=True)
class Document:
    """One conversation: ``token_ids`` [tokens] int32, ``loss_mask`` [tokens] uint8, and the row it came from."""

    number: int
    token_ids: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Invalid:
    """A row that cannot be trained on, and why."""

    number: int
    reason: str


class Encoder:
    """Turns rows into documents. A message cannot forge a control token (:func:`paddledsv4.sft.encoding.encode`)."""

    def __init__(self, config: ConversationConfig, tokenizer: ChatTokenizer):
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, rows: Sequence[RawRow]) -> list[Document | Invalid]:
        """One result per row, in order."""
        rendered = [self._render(row) for row in rows]
        whole = [r for r in rendered if isinstance(r, Rendered)]
        encoded = iter(self.tokenizer.encode_batch([r.pieces for r in whole]))
        return [
            self._document(row.number, r, next(encoded)) if isinstance(r, Rendered) else r
            for row, r in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: RawRow) -> Rendered | Invalid:
        config = self.config
        try:
            messages, mode = conversation(row.payload)
            rendered = render(
                messages, mode or config.thinking_mode, drop_thinking=config.drop_thinking,
                reasoning_effort=config.reasoning_effort, effort_ladder=config.effort_ladder,
            )  # fmt: skip
            rendered.text.encode()
        except UnicodeEncodeError:
            return Invalid(row.number, "holds half of a surrogate pair, which is no character")
        except (InvalidRow, AssertionError, RecursionError) as error:
            return Invalid(row.number, str(error))
        return rendered

    def _document(self, number: int, rendered: Rendered, segments) -> Document | Invalid:
        mask = np.frombuffer(segments_mask(segments, trained_spans(rendered, self.config.train_on)), np.uint8)
        ids = np.fromiter(chain.from_iterable([segment.ids for segment in segments]), np.int32, len(mask))
        if self.config.max_tokens is not None and len(ids) > self.config.max_tokens:
            return Invalid(number, f"has {len(ids)} tokens, more than max_tokens = {self.config.max_tokens}")
        if not mask.any():
            return Invalid(number, "has no token that is trained")
        return Document(number, ids, mask)


def stream_documents(
    path: str | Path,
    config: ConversationConfig | None = None,
    tokenizer: str | Path | None = None,
    workers: int = 0,
    skipped: list[Invalid] | None = None,
    advance: Advance | None = None,
) -> Iterator[Document]:
    """The documents of ``path`` in its order; the same for any number of workers.

    Args:
        path: .jsonl or .parquet; see :func:`paddledsv4.sft.rows.conversation` for a row.
        tokenizer: a tokenizer.json or its folder; None takes DeepSeek's, if installed.
        workers: processes that tokenise, started by spawn (a script needs its ``__main__`` guard); 0 tokenises in this
            process, on the threads of ``tokenizers``.
        skipped: gets the rows that ``skip_invalid`` left out.
        advance: told the ``size`` of the rows that are done.

    Raises:
        UserError: the file or the tokenizer cannot be read, a row is invalid and ``skip_invalid`` is off (the message
            has its number), no row is left, or a worker died.
    """
    config = config or ConversationConfig()
    rows = RowFile(path)
    source, count = load_tokenizer(tokenizer).path, 0
    for size, results in _encode_all(rows, config, source, workers):
        for result in results:
            if isinstance(result, Document):
                count += 1
                yield result
            elif not config.skip_invalid:
                raise UserError(f"{path}: row {result.number} {result.reason}; skip_invalid leaves such rows out")
            elif skipped is not None:
                skipped.append(result)
        if advance:
            advance(size)
    if not count:
        raise UserError(f"{path}: holds no conversation to train on")


def read_documents(
    path: str | Path,
    config: ConversationConfig | None = None,
    tokenizer: str | Path | None = None,
    workers: int = 0,
    skipped: list[Invalid] | None = None,
) -> list[Document]:
    """All of :func:`stream_documents`, with a bar on stderr where that is a terminal."""
    with progress_bar("tokenise", RowFile(path).size) as advance:
        return list(stream_documents(path, config, tokenizer, workers, skipped, advance))


def _chunks(rows: Iterable[RawRow], size: int) -> Iterator[list[RawRow]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def _encode_all(
    rows: Iterable[RawRow], config: ConversationConfig, tokenizer: Path, workers: int
) -> Iterator[tuple[int, list[Document | Invalid]]]:
    """Size and results of each chunk, in order; several chunks are under way at once."""
    if workers:
        spawn = multiprocessing.get_context("spawn")
        pool: Executor = ProcessPoolExecutor(workers, spawn, _start_worker, (config, tokenizer))
        encode = _encode
    else:  # Python renders one chunk while the library, which needs no interpreter lock, tokenises another
        pool = ThreadPoolExecutor(THREADS)
        encode = Encoder(config, load_tokenizer(tokenizer))
    waiting: deque[tuple[int, Future]] = deque()
    try:
        for chunk in _chunks(rows, CHUNK):
            waiting.append((sum(row.size for row in chunk), pool.submit(encode, chunk)))
            if len(waiting) > AHEAD * (workers or THREADS):
                size, future = waiting.popleft()
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()
    except BrokenProcessPool:
        raise UserError("a process that tokenises died, perhaps for lack of memory; try fewer workers") from None
    finally:  # also when the consumer stops early: no process outlives the stream
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(config: ConversationConfig, tokenizer: Path) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _encoder = Encoder(config, load_tokenizer(tokenizer))


def _encode(chunk: list[RawRow]) -> list[Document | Invalid]:
    return _encoder(chunk)
