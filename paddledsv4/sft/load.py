"""From the file of a recipe to rows for training and rows for evaluation."""

from __future__ import annotations

from paddledsv4.errors import UserError
from paddledsv4.sft.dataset import Document, Invalid, read_documents
from paddledsv4.sft.recipe import SftRecipe
from paddledsv4.sft.source import PackedSource, hold_out
from paddledsv4.sft.tokenizer import ChatTokenizer, load_tokenizer


def sources(recipe: SftRecipe) -> tuple[PackedSource, PackedSource | None, list[str]]:
    """Rows to train on, rows to evaluate (None: there are none), and what a person should know, in sentences.

    Raises:
        UserError: the tokenizer is not installed, a file cannot be read, a row is invalid or too long, or the model
            has fewer ids than the tokenizer.
    """
    data, length = recipe.data, recipe.training.sequence_length
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(recipe, tokenizer)
    skipped: list[Invalid] = []
    conversations = recipe.conversations.replace(max_tokens=recipe.conversations.max_tokens or length)

    def read(file: str) -> list[Document]:
        return read_documents(file, conversations, tokenizer.path, data.workers, skipped)

    def packed(documents: list[Document]) -> PackedSource:
        return PackedSource(documents, length, recipe.training.seed, data.multiple, tokenizer.pad_id)

    if data.evaluation:
        chosen, held = read(data.file), read(data.evaluation)
    else:
        chosen, held = hold_out(read(data.file), data.held_out, recipe.training.seed)
    train, evaluation = packed(chosen), packed(held) if held else None
    tokens = sum(map(len, chosen))
    notes = [f"{len(chosen)} conversations, {tokens:,} tokens, in {len(train)} sequences; {len(held)} held out"]
    if skipped:
        notes.append(f"{len(skipped)} invalid rows left out, the first: row {skipped[0].number} {skipped[0].reason}")
    return train, evaluation, notes


def check_vocabulary(recipe: SftRecipe, tokenizer: ChatTokenizer) -> None:
    """Whether the model has a row for every id.

    Raises:
        UserError: it has not.
    """
    ids = max(tokenizer.whole.get_vocab().values()) + 1
    if ids > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {recipe.model.vocab_size}: must be at least {ids}, the number of ids of "
            f"{tokenizer.path}"
        )
