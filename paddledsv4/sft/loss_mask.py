"""Which tokens of a conversation are trained: whole turns, found by characters, decided token by token.

A turn's span of characters is what its message contributed to the text. So an assistant's span holds its reasoning,
the closing ``</think>``, its text, its tool calls and the end of sentence; the opening ``<｜Assistant｜><think>``
belongs to the user's turn before it and is never trained.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from paddledsv4.errors import UserError
from paddledsv4.sft.prepare import Message
from paddledsv4.sft.render import MODES, Rendered, render
from paddledsv4.sft.tokenizer import ChatTokenizer, Segment, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]  # characters [start, end)
NO_SPAN = (sys.maxsize, sys.maxsize)  # behind every text

TRAIN_ON = ("assistant", "all-but-system")


class MaskedTokens(NamedTuple):
    """A conversation as token ids, and for each 1 if it is trained, else 0."""

    token_ids: list[int]
    loss_mask: list[int]

    @property
    def response_length(self) -> int:
        """How many tokens there are from the first trained one to the end; 0 if none is trained."""
        return len(self.loss_mask) - self.loss_mask.index(1) if 1 in self.loss_mask else 0

    @property
    def response_mask(self) -> list[int]:
        """The mask from the first trained token on; empty if none is, where ``loss_mask[-0:]`` would be all of it."""
        return self.loss_mask[len(self.loss_mask) - self.response_length :]


def multi_turn_loss_mask(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer | Tokenizer | None = None,
    thinking_mode: str = "chat",
    drop_thinking: bool = False,
    tools: Sequence[object] | None = None,
    *,
    train_on: str = "assistant",
) -> MaskedTokens:
    """Ids and mask of one conversation, tokenised as one text: ``token_ids, loss_mask = multi_turn_loss_mask(...)``.

    The rule is that of miles (peers-spec section 2): a token with character offsets (s, e) is trained if (s, e) is not
    (0, 0) and lies within the span of one trained turn. Tokens that share a character (byte-level pieces of an emoji)
    are trained together; a token that crosses the border of a turn is not trained. A text is tokenised whole here, as
    miles does, so a message that spells a control token becomes one; :mod:`paddledsv4.sft.dataset` applies the same
    rule to ids that cannot be forged.

    Args:
        messages: as :func:`paddledsv4.sft.encoding.encode_messages` takes them. ``step_loss_mask: 0`` on an assistant's
            message leaves its turn untrained.
        tokenizer: ours or a ``tokenizers.Tokenizer``; None loads the default one.
        thinking_mode: ``"chat"`` or ``"thinking"``.
        drop_thinking: False by default, the opposite of the encoder: training data keeps its reasoning. Has no effect
            when a message has tools.
        tools: accepted and left out of the text, as in miles; a warning says so. Put them on the system message.
        train_on: ``"assistant"``, or ``"all-but-system"``: all turns but the system's.

    Raises:
        ValueError: another thinking mode.
        UserError: another ``train_on``, or no tokenizer. And what ``encode_messages`` raises.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode must be 'chat' or 'thinking', got {thinking_mode!r}")
    if tools:
        warnings.warn("tools= is not rendered; put the tools on the system message", stacklevel=2)
    rendered = render(messages, thinking_mode, drop_thinking=drop_thinking)
    spans = trained_spans(rendered, train_on)
    tokenizer = tokenizer or load_tokenizer()
    whole = tokenizer.whole if isinstance(tokenizer, ChatTokenizer) else tokenizer
    encoding = whole.encode(rendered.text, add_special_tokens=False)
    return MaskedTokens(encoding.ids, offsets_mask(encoding.offsets, spans))


def trained_spans(rendered: Rendered, train_on: str = "assistant") -> list[Span]:
    """The spans of the turns that are trained.

    Raises:
        UserError: ``train_on`` is neither of :data:`TRAIN_ON`.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"train_on = {train_on!r}: must be one of: {', '.join(TRAIN_ON)}")
    return [
        span
        for turn, span in zip(rendered.turns, rendered.spans, strict=True)
        if turn.message.get("step_loss_mask", 1) != 0
        and (turn.message["role"] == "assistant" or (train_on == "all-but-system" and turn.message["role"] != "system"))
    ]


def offsets_mask(offsets: Iterable[Span], spans: Sequence[Span], start: int = 0) -> list[int]:
    """1 for each token that lies within one of ``spans``, else 0; ``offsets`` [tokens] count from ``start``."""
    return [
        int((s, e) != (0, 0) and any(first <= s + start and e + start <= last for first, last in spans))
        for s, e in offsets
    ]


def segments_mask(segments: Sequence[Segment], spans: Sequence[Span]) -> bytearray:
    """The mask of separately tokenised segments, a byte per token; ``segments`` and ``spans`` are in order.

    Offsets are looked at only where a border falls within a text.
    """
    mask, following = bytearray(), iter(spans)
    first, last = next(following, NO_SPAN)
    for segment in segments:
        start, end = segment.start, segment.end
        while last <= start:
            first, last = next(following, NO_SPAN)
        if end <= first:
            mask += bytes(len(segment.ids))
        elif first <= start and end <= last:
            mask += b"\1" * len(segment.ids)
        else:
            mask += bytes(offsets_mask(segment.offsets, spans, start))
    return mask
