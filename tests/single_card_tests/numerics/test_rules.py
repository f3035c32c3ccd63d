"""Rules for ops and layers: their forms, their order, what they reach, and one clear error for every mistake."""

import pytest
import yaml
from reference import tiny_configs, tiny_model

from paddledsv4.config import Recipe
from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.numerics.rules import LayerRule, Overrides, layer_rules

SWIGLU = LayerRule("decoder.layers.2.*", "swiglu", "plain")
OPS = load_all()


def variant_of(layer, op) -> str:
    function = getattr(layer.ops, op)
    return next(v.name for v in OPS[op].variants.values() if v.function is function)


def variants(model, op) -> dict[str, str]:
    layers = [("", model), *model.named_sublayers()]
    return {path: variant_of(layer, op) for path, layer in layers if hasattr(layer, "ops")}


def tiny(layers=(), ops=None) -> DeepseekV4Model:
    return DeepseekV4Model(tiny_configs()[0], Policy.preset("paddle", ops, layers))


def test_a_layer_rule_reaches_its_layers_only():
    chosen = variants(tiny([SWIGLU]), "swiglu")
    inside = {path for path in chosen if path.startswith("decoder.layers.2.")}
    assert inside and {path for path, name in chosen.items() if name == "plain"} == inside
    assert set(variants(tiny([SWIGLU]), "rope").values()) == {"paddle"}


def test_paths_of_layers_are_megatrons_names():
    """Every parameter of a layer with ops is named by the path that its rules see."""
    model, seen = tiny_model(), set()
    original = Policy.ops
    try:
        Policy.ops = lambda self, path="", **options: seen.add(path) or original(self, path, **options)
        DeepseekV4Model(tiny_configs()[0], Policy.preset("paddle"))
    finally:
        Policy.ops = original
    assert seen == {"", *(path for path, layer in model.named_sublayers() if hasattr(layer, "ops"))}


def test_a_trailing_star_includes_the_layer_itself():
    rule = LayerRule("decoder.layers.*.self_attention.*", "rope", "plain")
    assert rule.matches("decoder.layers.0.self_attention")
    assert rule.matches("decoder.layers.0.self_attention.core_attention.compressor")
    assert not rule.matches("decoder.layers.0.self_attention_hyper_connection")
    assert not rule.matches("decoder.layers.0")


def test_no_glob_reaches_the_model_and_its_optimizer():
    policy = Policy.preset("paddle", layers=[LayerRule("*", "cross_entropy", "plain")])
    assert policy.at("")["cross_entropy"] == "paddle" and policy.at("output_layer")["cross_entropy"] == "plain"


def test_layer_rules_win_and_later_rules_win():
    later = LayerRule("decoder.layers.2.mlp.*", "swiglu", "megatron")
    policy = Policy.preset("paddle", {"swiglu": "megatron"}, [SWIGLU])
    assert policy.at("decoder.layers.2.mlp.shared_experts")["swiglu"] == "plain"
    assert policy.at("decoder.layers.1.mlp.shared_experts")["swiglu"] == "megatron"
    both = Policy.preset("paddle", layers=[SWIGLU, later])
    assert both.at("decoder.layers.2.mlp.shared_experts")["swiglu"] == "megatron"
    assert Policy.preset("paddle", layers=[later, SWIGLU]).at("decoder.layers.2.mlp.router")["swiglu"] == "plain"
    again = Policy.preset("paddle", layers=[SWIGLU, LayerRule(SWIGLU.glob, "swiglu", "paddle")])
    assert len(again.layers) == 1 and again.at("decoder.layers.2.mlp")["swiglu"] == "paddle"


def test_the_environment_yaml_and_options_say_the_same():
    text = "decoder.layers.2.*:swiglu=plain, mtp.*:rope=plain"
    by_environment = Policy.from_env(environ={"PADDLEDSV4_NUMERICS_LAYERS": text, "PADDLEDSV4_SINKHORN": "plain"})
    config, _ = tiny_configs()
    values = yaml.safe_load(
        '{sinkhorn: plain, layers: {"decoder.layers.2.*": {swiglu: plain}, "mtp.*": {rope: plain}}}'
    )
    by_recipe = Policy.from_env(*Recipe(model=config, numerics=values).numerics_choice(), environ={})
    options = Overrides.from_texts(["sinkhorn=plain"], ["decoder.layers.2.*:swiglu=plain", "mtp.*:rope=plain"])
    by_options = Policy.from_env(overrides=options, environ={})
    assert by_environment == by_recipe == by_options
    assert len({p.fingerprint for p in (by_environment, by_recipe, by_options)}) == 1


def test_options_win_over_the_environment():
    environ = {"PADDLEDSV4_SWIGLU": "plain", "PADDLEDSV4_NUMERICS_LAYERS": str(SWIGLU)}
    given = Overrides.from_texts(["swiglu=megatron", "swiglu=paddle"], ["decoder.layers.2.mlp.*:swiglu=megatron"])
    policy = Policy.from_env(overrides=given, environ=environ)
    assert policy.choices["swiglu"] == "paddle"
    assert policy.at("decoder.layers.2.mlp.experts")["swiglu"] == "megatron"
    assert policy.at("decoder.layers.2.self_attention")["swiglu"] == "plain"


def test_fingerprint_description_and_difference_know_the_layers():
    bare, ruled = Policy.preset("paddle"), Policy.preset("paddle", layers=[SWIGLU])
    assert bare.fingerprint != ruled.fingerprint
    assert ruled.describe()["decoder.layers.2.*:swiglu"] == "plain"
    assert Policy.diff(bare, ruled) == {"layers": ("", str(SWIGLU))} and Policy.diff(bare, bare) == {}
    assert bare.label == "paddle" and ruled.label == f"paddle-{ruled.fingerprint}"
    with pytest.raises(AttributeError):
        ruled.layers = ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("swiglu=paddle", "GLOB:OP=VARIANT"),
        ("decoder.*:swiglu", "GLOB:OP=VARIANT"),
        ("decoder.*:=paddle", "GLOB:OP=VARIANT"),
        (":swiglu=paddle", "GLOB:OP=VARIANT"),
        ("decoder.*:swiglu=paddle,", "separated by commas"),
        ("decoder.*:swiglu=paddle=plain", "GLOB:OP=VARIANT"),
        ("", "GLOB:OP=VARIANT"),
    ],
)
def test_malformed_texts(text, says):
    with pytest.raises(UserError, match=says):
        layer_rules(text, "--layer-op")
    with pytest.raises(UserError):
        Overrides.from_texts([text.replace("=", "")], [])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LayerRule("decoder.*", "swiglo", "paddle"), ["swiglo", "swiglu"]),
        (LayerRule("decoder.*", "swiglu", "fast"), ["fast", "paddle, plain, megatron"]),
    ],
)
def test_unknown_names_in_layer_rules(rule, words):
    with pytest.raises(UserError) as error:
        Policy.preset("paddle", layers=[rule])
    assert all(word in str(error.value) for word in words)


def test_a_glob_without_a_layer_is_an_error_that_lists_the_layers():
    with pytest.raises(UserError) as error:
        tiny([SWIGLU, LayerRule("decoder.layers.4.*", "swiglu", "plain")])
    assert "decoder.layers.4.*:swiglu=plain" in str(error.value) and "decoder.layers.3.mlp.router" in str(error.value)


@pytest.mark.parametrize(
    ("numerics", "says"),
    [
        (5, "numerics = 5: must be"),
        ({"preset": 3}, "numerics.preset = 3"),
        ({"swiglu": 1}, "numerics.swiglu = 1"),
        ({"layers": ["a"]}, "numerics.layers = "),
        ({"layers": {"decoder.*": "plain"}}, "numerics.layers.decoder.* = 'plain'"),
        ({"layers": {"decoder.*": {"swiglu": 1}}}, "numerics.layers.decoder.* = "),
    ],
)
def test_malformed_recipes(numerics, says):
    with pytest.raises(UserError) as error:
        Recipe(model=tiny_configs()[0], numerics=numerics)
    assert says in str(error.value)
