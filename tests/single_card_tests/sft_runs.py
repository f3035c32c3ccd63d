"""A fine-tuning run that takes seconds: a tokenizer of bytes, a model with every mechanism, a few conversations."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from layouts import configs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from paddledsv4.sft.tokens import CONTROLS, EOS


def byte_tokenizer(path: Path) -> Path:
    """tokenizer.json with an id for every byte and for the control tokens of the format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (EOS, *(t for t in CONTROLS if t != EOS))])
    tokenizer.save(str(path))
    return path


def conversation(number: int, length: int = 12) -> dict:
    question, answer = f"What is {number}?", f"It is {number}" + "." * (number * 7 % length)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sft_recipe(folder: Path, **sections) -> Path:
    """recipe.yaml in ``folder`` with its tokenizer and file of 24 rows; ``sections`` are changes to its sections."""
    byte_tokenizer(folder / "tokenizer.json")
    rows = [json.dumps(conversation(n)) + "\n" for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    model, training = configs(
        vocab_size=288, hidden_size=32, sequence_length=96, steps=4, gradient_accumulation_steps=1,
        indexer_loss_scale="per_microbatch",
    )  # fmt: skip
    training = training.model_dump(mode="json")
    del training["linear_cross_entropy"]
    values = {
        "model": model.model_dump(mode="json"), "training": training, "numerics": "paddle", "evaluation_interval": 2,
        "data": {"file": "rows.jsonl", "tokenizer": "tokenizer.json", "held_out": 0.2, "multiple": 8},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "recipe.yaml"
