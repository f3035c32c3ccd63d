"""The policy: presets, overrides, clear errors, fingerprint."""

import pytest

from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import PRESETS, Policy
from paddledsv4.numerics.registry import load_all


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_chooses_a_variant_of_every_op(name):
    if name == "torch":
        pytest.importorskip("torch", reason="the torch preset needs paddledsv4[torch]")
    policy, ops = Policy.preset(name), load_all()
    assert set(policy.choices) == set(ops)
    assert all(choice in ops[op].variants for op, choice in policy.choices.items())
    assert set(vars(policy.ops())) == set(ops)


def test_auto_takes_a_kernel_where_it_runs_and_says_why_not_elsewhere(monkeypatch):
    here = Policy.preset("auto")
    assert here.choices["rms_norm"] == "paddle" and here.choices["sinkhorn"] == Policy.preset().choices["sinkhorn"]
    assert any("no GPU" in line and "rms_norm" in line for line in here.remarks)
    assert not Policy.preset("paddle").remarks and not Policy.preset("auto", {"rms_norm": "plain"}).passed_over.get(
        "rms_norm"
    )
    pytest.importorskip("triton")
    with pytest.raises(UserError, match="fused of op rms_norm cannot run here: no GPU"):
        Policy.preset("paddle", {"rms_norm": "fused"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    there = Policy.preset("auto")
    assert there.choices["rms_norm"] == "fused" and "rms_norm" not in there.passed_over


def test_every_op_has_a_native_variant_and_says_what_it_is():
    for op in load_all().values():
        assert "paddle" in op.variants, op.name
        assert op.summary and op.spec
        assert all(variant.note for variant in op.variants.values())


def test_the_environment_chooses():
    environ = {"PADDLEDSV4_NUMERICS": "plain", "PADDLEDSV4_SINKHORN": "paddle", "HOME": "/"}
    policy = Policy.from_env(environ=environ)
    assert policy.name == "plain"
    assert policy.choices["sinkhorn"] == "paddle"
    assert policy.choices["rms_norm"] == "plain"
    assert Policy.diff(policy, Policy.preset("plain")) == {"sinkhorn": ("paddle", "plain")}


def test_an_argument_beats_the_environment():
    assert Policy.from_env("paddle", environ={"PADDLEDSV4_NUMERICS": "plain"}).name == "paddle"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PADDLEDSV4_NUMERICS": "pladdle"}, ["'pladdle'", "paddle", "plain"]),
        ({"PADDLEDSV4_SINKHORM": "paddle"}, ["PADDLEDSV4_SINKHORM", "PADDLEDSV4_SINKHORN"]),
        ({"PADDLEDSV4_SINKHORN": "torches"}, ["sinkhorn", "'torches'", "paddle, plain"]),
    ],
)
def test_a_wrong_name_lists_the_legal_ones(environ, words):
    with pytest.raises(UserError) as error:
        Policy.from_env(environ=environ)
    assert all(word in str(error.value) for word in words)


def test_the_fingerprint_follows_the_choices():
    paddle, plain = Policy.preset("paddle"), Policy.preset("plain")
    assert paddle.fingerprint == Policy.preset("paddle").fingerprint
    assert paddle.fingerprint != plain.fingerprint
    assert Policy.preset("paddle", {"sinkhorn": "plain"}).fingerprint != paddle.fingerprint
