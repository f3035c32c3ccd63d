"""PaddleFormers' configuration of our model: every way in which config.json is written, and back."""

import json
import shutil

import pytest
from formers_runs import formers_config, settings
from paddleformers.transformers import AutoConfig
from reference import ROOT

from paddledsv4 import formers
from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError

DATA = ROOT / "tests" / "data"
FILES = {name: DATA / f"{name}_config.json" for name in ("flash", "pro", "hf_tiny")}


def folder(tmp_path, name: str):
    shutil.copy(FILES[name], tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_auto_config_reads_what_we_read(tmp_path, name):
    config = AutoConfig.from_pretrained(str(folder(tmp_path, name)))
    packing = {"expert_dtype": None, "quantization_config": None}
    assert type(config) is formers.DeepseekV4Config
    assert config.model_config() == ModelConfig.from_file(FILES[name]).replace(**packing)
    assert config.hidden_size == json.loads(FILES[name].read_text())["hidden_size"] and not config.tie_word_embeddings


def test_there_and_back(tmp_path):
    config = formers_config(*settings(), precision="bf16")
    config.save_pretrained(tmp_path)
    assert ModelConfig.from_file(tmp_path / "config.json") == config.model_config()
    again = AutoConfig.from_pretrained(str(tmp_path))
    assert again.model_config() == config.model_config() and again.precision() == "bf16"
    assert again.architectures == ["DeepseekV4ForCausalLM"]


def test_arguments_win_over_the_file(tmp_path):
    config = AutoConfig.from_pretrained(str(folder(tmp_path, "flash")), numerics="megatron", seq_aux_loss_coeff=0.5)
    assert config.numerics == "megatron" and config.seq_aux_loss_coeff == 0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hiden_size": 3}, "hiden_size is not a known key; did you mean hidden_size?"),
        ({"hidden_size": None}, "hidden_size = None: must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence):
    values = ModelConfig.from_file(FILES["hf_tiny"]).model_dump() | change
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        formers.DeepseekV4Config(**values)
    assert sentence in str(error.value)


def test_a_config_without_a_model_says_what_is_missing():
    config = formers.DeepseekV4Config()
    assert config.vocab_size is None and "deepseek_v4" in repr(config)
    with pytest.raises(UserError, match="vocab_size is missing"):
        formers.DeepseekV4ForCausalLM(config)


def test_an_unknown_dtype():
    model, train = settings()
    config = formers_config(model, train)
    config.dtype = "float16"
    with pytest.raises(UserError, match="dtype = 'float16': must be one of: float32, float64, bfloat16"):
        formers.DeepseekV4ForCausalLM(config)
