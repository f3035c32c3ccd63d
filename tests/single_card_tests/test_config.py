"""Configurations: every style of file reads the same; every mistake is one sentence naming its field."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from paddledsv4.config import ModelConfig, OptimizerConfig, ParallelConfig, Recipe, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.rules import Overrides

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
TINY = ModelConfig.from_file(ROOT / "configs" / "tiny.yaml").model_dump(mode="json", exclude_none=True)
TRAINING = {"sequence_length": 8, "micro_batch_size": 2, "steps": 3, "optimizer": {"lr": 1e-3}}


def error_of(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_recipes_are_the_released_configs(name):
    released = ModelConfig.from_file(DATA / f"{name}_config.json")
    checkpoint_only = ("quantization_config", "topk_method", "bos_token_id", "eos_token_id", "expert_dtype")
    recipe = ModelConfig.from_file(ROOT / "configs" / f"{name}.yaml")
    assert recipe == released.replace(**dict.fromkeys(checkpoint_only))


def test_released_flash():
    flash = ModelConfig.from_file(DATA / "flash_config.json")
    ratios = [flash.layer_ratio(layer) for layer in range(44)]
    assert (ratios.count(4), ratios.count(128), ratios.count(0)) == (21, 20, 3)
    assert [flash.is_hash_layer(layer) for layer in (0, 2, 3, 43)] == [True, True, False, False]


def test_transformers_style_becomes_the_released_style():
    config = ModelConfig.from_file(DATA / "hf_tiny_config.json")
    assert config.compress_ratios == (0, 4, 128, 4)
    assert config.num_hash_layers == 2
    assert (config.rope_scaling.type, config.rope_scaling.factor) == ("yarn", 16.0)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)


def test_transformers_style_derives_what_is_missing():
    values = json.loads((DATA / "hf_tiny_config.json").read_text())
    for key in ("qk_rope_head_dim", "rope_theta", "compress_rope_theta"):
        del values[key]
    config = ModelConfig.from_dict(values | {"num_nextn_predict_layers": 2})
    assert config.compress_ratios == (0, 4, 128, 4, 0, 0)
    assert config == ModelConfig.from_file(DATA / "hf_tiny_config.json").replace(
        num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 4, 0, 0]
    )


def test_bundle_config_json_and_folder(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "model": TINY}))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "recipe.yaml").write_text("model: config.json\n")
    tiny = ModelConfig.from_dict(TINY)
    for source in (tmp_path, tmp_path / "bundle.json", tmp_path / "config.json", tmp_path / "recipe.yaml"):
        assert ModelConfig.from_file(source) == tiny


def test_no_mtp_layers_and_several():
    assert ModelConfig.from_dict(TINY | {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128, 4]})
    assert ModelConfig.from_dict(
        TINY | {"num_nextn_predict_layers": 2, "compress_ratios": [0, 4, 128, 4, 0, 0]}
    )


def test_indexer_rules_hold_only_where_there_is_an_indexer():
    config = TINY | {"compress_ratios": [0, 128, 128, 0, 0], "index_head_dim": 12}
    assert ModelConfig.from_dict(config).index_head_dim == 12


def test_frozen():
    with pytest.raises(ValidationError):
        ModelConfig.from_dict(TINY).vocab_size = 3


# -- what is refused --------------------------------------------------------------------------------------

BAD_MODELS = [
    ({"hiden_size": 128}, "hiden_size", "did you mean hidden_size?"),
    ({"compress_ratios": [0, 4, 128, 4]}, "compress_ratios", "has 4 entries, must have 5"),
    ({"compress_ratios": [0, 4, 64, 4, 0]}, "compress_ratios.2", "must be 0, 4 or 128"),
    ({"compress_ratios": "0,4"}, "compress_ratios", "must be a list"),
    ({"compress_ratios": [0, "4", 128, 4, 0]}, "compress_ratios.1", "must be a whole number"),
    ({"o_groups": 3}, "o_groups", "must divide num_attention_heads x head_dim (256)"),
    ({"num_key_value_heads": 2}, "num_key_value_heads", "must be 1"),
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim", "must be even"),
    ({"qk_rope_head_dim": 34}, "qk_rope_head_dim", "at most head_dim (32)"),
    ({"head_dim": 64, "qk_rope_head_dim": 64}, "qk_rope_head_dim", "at most index_head_dim (32)"),
    ({"index_head_dim": 24}, "index_head_dim", "power of two"),
    ({"index_topk": 0}, "index_topk", "at least 1"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok", "at most n_routed_experts (8)"),
    ({"num_hash_layers": 5}, "num_hash_layers", "at most num_hidden_layers (4)"),
    ({"num_hash_layers": -1}, "num_hash_layers", "at least 0"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "at least 0"),
    ({"n_shared_experts": -1}, "n_shared_experts", "at least 0"),
    ({"hc_mult": 0}, "hc_mult", "at least 1"),
    ({"scoring_func": "sigmoid"}, "scoring_func", "must be 'sqrtsoftplus'"),
    ({"model_type": "deepseek_v3"}, "model_type", "must be 'deepseek_v4'"),
    ({"topk_method": "greedy"}, "topk_method", "must be 'noaux_tc'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings", "must be false"),
    ({"attention_bias": True}, "attention_bias", "must be false"),
    ({"attention_dropout": 0.1}, "attention_dropout", "must be 0.0"),
    ({"hidden_act": "gelu"}, "hidden_act", "must be silu"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob", "must be true or false"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 8}},
     "rope_scaling.type", "must be 'yarn'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor", "missing"),
    ({"rope_scaling": TINY["rope_scaling"] | {"attention_factor": 1.2}}, "attention_factor", "must be 1.0"),
    ({"rope_scaling": 4}, "rope_scaling", "must be a mapping"),
    ({"rope_theta": math.nan}, "rope_theta", "finite"),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor", "finite"),
    ({"swiglu_limit": -1.0}, "swiglu_limit", "greater than 0"),
    ({"initializer_range": -0.1}, "initializer_range", "at least 0"),
    ({"vocab_size": "512"}, "vocab_size", "must be a whole number"),
    ({"vocab_size": True}, "vocab_size", "must be a whole number"),
    ({"hidden_size": 128.0}, "hidden_size", "must be a whole number"),
    ({"rms_norm_eps": None}, "rms_norm_eps", "must be a number"),
    ({"layer_types": ["full_attention"] * 4}, "layer_types.0", "must be one of"),
    ({"layer_types": ["sliding_attention"] * 4}, "compress_ratios", "contradicts layer_types"),
    ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "mlp_layer_types", "before the first moe"),
    ({"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types.0", "must be one of"),
    ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim", "contradicts partial_rotary_factor"),
]  # fmt: skip

SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim",
    "index_topk", "hc_mult", "hc_sinkhorn_iters", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size",
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field", "legal"), BAD_MODELS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_model(changes, field, legal):
    message = error_of(ModelConfig.from_dict, TINY | changes, where="my.json")
    assert message.startswith("my.json: ") and field in message and legal in message


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_positive(field, value):
    assert error_of(ModelConfig.from_dict, TINY | {field: value}, where="f") == (
        f"f: {field} = {value}: must be at least 1"
    )


def test_missing_field_and_direct_construction():
    assert error_of(ModelConfig, model_type="deepseek_v4") == "vocab_size is missing"
    assert error_of(ModelConfig.from_dict, [1], where="f").startswith("f: model = [1]: must be a mapping")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"precision": "fp16"}, "training.precision"),
        ({"sequence_length": 0}, "training.sequence_length"),
        ({"step": 3}, "training.step is not a known key; did you mean steps?"),
        ({"clip_grad_norm": math.nan}, "training.clip_grad_norm"),
        ({"seed": -1}, "training.seed"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr"),
        ({"optimizer": {"lr": 1.0, "name": "sgd"}}, "optimizer.name"),
        ({"optimizer": {"lr": 1.0, "schedule": "wsd"}}, "optimizer.schedule"),
        ({"optimizer": {"lr": 1.0, "betas": [0.9, 1.0]}}, "optimizer.betas.1"),
        ({"optimizer": {"lr": 1.0, "betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"lr": 1.0, "min_lr": 2.0}}, "optimizer.min_lr"),
        ({"optimizer": {"lr": 1.0, "no_decay": "norms"}}, "optimizer.no_decay"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_training(changes, field):
    assert field in error_of(TrainConfig.from_dict, TRAINING | changes, where="t.yaml")


def test_training_replace_is_validated():
    training = TrainConfig.from_dict(TRAINING)
    assert training.replace(steps=7).steps == 7
    assert training.replace(steps=7).optimizer == OptimizerConfig(lr=1e-3)
    assert "training.steps = 0" in error_of(training.replace, steps=0)


def test_parallel_sizes_agree():
    assert ParallelConfig(world_size=8, data=8, expert=8).expert == 8
    assert "parallel.world_size = 4" in error_of(ParallelConfig, world_size=4, data=2)
    assert "parallel.expert = 3" in error_of(ParallelConfig, world_size=4, data=4, expert=3)
    assert "parallel.expert_tensor = 3: must divide tensor (2)" in error_of(
        ParallelConfig, world_size=2, tensor=2, expert_tensor=3
    )
    assert "data x tensor x context / expert_tensor (2)" in error_of(
        ParallelConfig, world_size=4, data=2, tensor=2, expert=4
    )
    assert ParallelConfig(world_size=4, data=2, tensor=2, expert=4, expert_tensor=1).expert_tensor_size == 1


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "mapping"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "training: {}", "model is missing"),
        ("a.yaml", "model: 3", "model = 3"),
        ("a.yaml", "model: nowhere.json", "nowhere.json: cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    assert said in error_of(ModelConfig.from_file, tmp_path / name)


def test_folder_without_a_config(tmp_path):
    assert "neither a bundle.json nor a config.json" in error_of(ModelConfig.from_file, tmp_path)


def test_recipe(tmp_path):
    recipe = Recipe.from_file(ROOT / "configs" / "tiny.yaml")
    assert Path(recipe.data.tokens) == (ROOT / "align/data/tiny-fp32/tokens.npy").resolve()
    assert recipe.training.optimizer.lr == 1e-3  # YAML 1.1 alone would read the text "1e-3"
    assert recipe.numerics_choice() == (None, Overrides())
    values = json.dumps({"model": TINY, "numerics": {"preset": "plain", "sinkhorn": "paddle"}})
    (tmp_path / "r.yaml").write_text(values)
    recipe = Recipe.from_file(tmp_path / "r.yaml")
    assert recipe.numerics_choice() == ("plain", Overrides({"sinkhorn": "paddle"}))
    assert "training is missing" in error_of(recipe.require, "training")


@pytest.mark.parametrize("bundle", ["tiny-fp32", "tiny-bf16", "ep8-fp32", "seq1k-fp32"])
def test_every_reference_bundle_reads(bundle):
    folder = ROOT.parent / "shared" / "reference" / bundle
    if not folder.exists():
        pytest.skip("the references are not on this machine")
    values = json.loads((folder / "bundle.json").read_text())
    assert ModelConfig.from_file(folder).model_dump(mode="json", exclude_none=True) == values["model"]
    training = TrainConfig.from_dict(values["training"], where=bundle)
    assert {
        key: training.model_dump(mode="json")[key] for key in values["training"] if key != "optimizer"
    } == {key: value for key, value in values["training"].items() if key != "optimizer"}
    assert (
        ParallelConfig.from_dict(values["parallel"], where=bundle).world_size
        == values["parallel"]["world_size"]
    )
