"""The checks can fail: six bugs, each planted alone, each found by at least one of them.

At its initial weights the tiny model mixes four almost equal streams almost uniformly, so the first step cannot tell
3 Sinkhorn iterations from 20. The weights of hf_tiny can; both references look at every bug.
"""

import numpy as np
import pytest
from bounds import FORWARD_BOUND, GRADIENTS, failures, gradient_bounds
from reference import errors, hf_logits_error, hf_model, reference_tensors, run_first_step, tiny_model


def _untransposed_mix(original):
    return lambda h_res, *rest: original(h_res.transpose([0, 1, 3, 2]), *rest)


def _without_sink(original):
    return lambda q, kv, comp, sel, sink, **kw: original(q, kv, comp, sel, sink - 1e4, **kw)


def _rolled_ape(original):
    return lambda kv, score, ape, **kw: original(kv, score, ape.roll(1, 0), **kw)


def _eps_of_a_thousandth(original):
    return lambda x, weight, eps: original(x, weight, 1e-3)


def _three_sinkhorn_iterations(original):
    return lambda logits, iterations, eps, dtype: original(logits, 3, eps, dtype)


def _routed_scaling_one_percent_up(original):
    return lambda scores, index, scaling, normalise: original(scores, index, scaling * 1.01, normalise)


BUGS = {
    "hc_mix": _untransposed_mix,
    "sparse_attention": _without_sink,
    "compress": _rolled_ape,
    "rms_norm": _eps_of_a_thousandth,
    "sinkhorn": _three_sinkhorn_iterations,
    "router_probs": _routed_scaling_one_percent_up,
}


def plant(model, op):
    for layer in model.sublayers(include_self=True):
        if hasattr(layer, "ops"):
            setattr(layer.ops, op, BUGS[op](getattr(layer.ops, op)))
    return model


@pytest.fixture(scope="module")
def exact():
    return run_first_step(tiny_model("plain", "fp64"))


@pytest.fixture(scope="module")
def plain():
    return run_first_step(tiny_model("plain", "fp32"))


@pytest.mark.parametrize("op", BUGS)
def test_a_planted_bug_is_found(op, exact, plain):
    planted = run_first_step(plant(tiny_model(), op))
    rows = errors(reference_tensors("forward"), planted.forward)
    found = {"forward": len(failures(rows, dict.fromkeys(rows, FORWARD_BOUND)))}
    for kind, pick in GRADIENTS.items():
        reference = reference_tensors(kind)
        bounds = gradient_bounds(reference, getattr(exact, pick), getattr(plain, pick))
        found[kind] = len(failures(errors(reference, getattr(planted, pick)), bounds))
    found["hf_tiny logits"] = int(hf_logits_error(plant(hf_model("hf"), op)) > 2e-5)
    print(op, found)
    assert any(found.values())


def test_nan_is_found():
    assert failures({"x": float("nan")}, {"x": 1.0})
    assert errors({"x": np.ones(3)}, {"x": np.array([1.0, np.nan, 1.0])})["x"] == float("inf")
