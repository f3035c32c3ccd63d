"""Adapters alone learn the shipped conversations by heart, on a base of frozen random weights."""

import json
import subprocess
import sys

import pytest
import yaml
from reference import ROOT

tokenizers = pytest.importorskip("tokenizers", reason="needs paddledsv4[sft]")

from paddledsv4.sft.tokens import CONTROLS  # noqa: E402

SAMPLE = ROOT / "paddledsv4" / "sft" / "data" / "sample.jsonl"
STEPS = 900


def small_tokenizer(path) -> int:
    """Bytes merged over the sample's own text, with the format's control tokens: the number of ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer, letters = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=letters, show_progress=False)
    tokenizer.train([str(SAMPLE)], trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


@pytest.mark.slow
def test_adapters_alone_learn_the_sample_by_heart(tmp_path):
    """configs/sft-overfit-lora.yaml with a small vocabulary, which takes minutes instead of most of an hour."""
    recipe = yaml.safe_load((ROOT / "configs" / "sft-overfit-lora.yaml").read_text())
    recipe["model"]["vocab_size"] = small_tokenizer(tmp_path / "tokenizer.json")
    recipe["training"] |= {"sequence_length": 1024, "steps": STEPS}
    recipe["data"] = {"file": str(SAMPLE), "tokenizer": str(tmp_path / "tokenizer.json"), "held_out": 0.0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "paddledsv4", "sft", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "run"]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, timeout=3600)
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    losses = [float(line["main"]) for line in lines if "main" in line]
    assert len(losses) == STEPS and losses[0] > 5
    assert sum(losses[-50:]) / 50 < 0.1  # more than an epoch
