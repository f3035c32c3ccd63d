"""The distance between kernels: how it is counted, and that the shipped measurement still holds."""

import numpy as np
import paddle
import pytest
from reference import microbatch, tiny_model
from typer.testing import CliRunner

from align.bundle import load_bundle
from align.calls import CallRecorder
from align.cli import app
from align.ulps import Distance, measure, record_step, report
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.numerics.ulps import measured, notes
from paddledsv4.observe.replay import replay

OPS = ("grad_norm", "hadamard", "rms_norm", "rope_table", "router_logits", "router_scores", "swiglu")


def test_distances_are_counted_in_units_of_the_last_place():
    distance = Distance()
    one = np.float32(1.0)
    ours = np.array([1.0, np.nextafter(one, 2 * one), 1.0, np.inf], np.float32)
    theirs = np.array([1.0, 1.0, np.nextafter(np.nextafter(one, 2 * one), 2 * one), np.inf], np.float32)
    distance.add(paddle.to_tensor(ours), paddle.to_tensor(theirs))
    assert (distance.elements, distance.equal, distance.max, distance.total) == (4, 2, 2.0, 3.0)
    assert distance.to_dict() == {"elements": 4, "equal": 0.5, "max": 2.0, "mean": 0.75, "scaled": 2.0}
    distance.add(paddle.to_tensor([float("nan")]), paddle.to_tensor([1.0]))
    assert distance.max == np.inf
    both = Distance()  # a NaN equals nothing, not even a NaN
    both.add(paddle.to_tensor([float("nan"), 1.0]), paddle.to_tensor([float("nan"), 1.0]))
    assert (both.equal, both.max, both.scaled, both.largest) == (1, np.inf, np.inf, np.inf)
    missing = Distance()
    missing.add(None, paddle.to_tensor([0.0, 1.0]))
    assert (missing.elements, missing.equal) == (2, 1)
    assert Distance().to_dict() is None


def test_bfloat16_has_its_own_last_place():
    distance = Distance()
    one, next_one = paddle.to_tensor([1.0]).astype("bfloat16"), paddle.to_tensor([1.0 + 2**-7]).astype("bfloat16")
    distance.add(one, next_one)
    assert distance.max == 1.0 and distance.scaled == 1.0


def test_recording_changes_no_bit_and_replaying_repeats_it():
    model, ids = tiny_model("paddle"), microbatch(0)[0][:, :40]
    before = model(ids)
    with CallRecorder(model, {"swiglu"}) as recorder:
        during = model(ids)
        during.sum().backward()
    assert np.array_equal(before.numpy(), during.numpy())
    call = recorder.calls[0]
    assert call.op == "swiglu" and call.path.startswith("decoder.layers.0.mlp.") and 0 in call.gradients
    function = load_all()["swiglu"].variants["paddle"].function
    first, second = replay(call, function), replay(call, function)
    assert len(first[1]) == 1 and all(
        np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True)
    )
    recorded = len(recorder.calls)
    model(ids)  # nobody records any more
    assert len(recorder.calls) == recorded == sum(c.op == "swiglu" for c in recorder.calls)


def holds(shipped: dict, found: dict) -> bool:
    """Whether a measurement agrees with the shipped one: fraction of equal elements to 0.05, mean to a factor of 4."""
    for side in ("forward", "backward"):
        one, other = shipped[side], found[side]
        if (one is None) != (other is None):
            return False
        if one is None:
            continue
        low, high = sorted((one["mean"], other["mean"]))
        if abs(one["equal"] - other["equal"]) > 0.05 or high > 4 * low:
            return False
    return True


def test_the_shipped_measurement_holds():
    pytest.importorskip("torch", reason="compares with torch's kernels")
    bundle, megatron, torch = load_bundle("tiny-fp32"), Policy.preset("megatron"), Policy.preset("torch")
    calls = record_step(bundle, megatron, set(OPS))
    found, shipped = report(measure(calls, megatron, torch), bundle)["ops"], measured()
    assert set(found) == set(OPS)
    wrong = {op: (shipped["ops"][op], found[op]) for op in OPS if not holds(shipped["ops"][op], found[op])}
    assert not wrong, "align ulps tiny-fp32 --write measures again"
    # the check can fail: the same calls with the paddle variants are further off
    native = report(measure(calls, Policy.preset("paddle"), torch), bundle)["ops"]
    assert not any(holds(shipped["ops"][op], native[op]) for op in ("hadamard", "rms_norm", "swiglu"))


def test_the_shipped_measurement_says_where_it_comes_from():
    made = measured()["made_with"]
    assert made["paddle"] and made["torch"] and made["processor"] and made["bundle"] == "tiny-fp32"
    assert made["environment"]["MKL_CBWR"] == "AVX2"
    assert set(measured()["ops"]) == set(load_all())


def test_notes_name_every_op_that_runs_as_megatron():
    lines = "\n".join(notes(Policy.preset("megatron")))
    assert all(op in lines for op in load_all())
    assert notes(Policy.preset("paddle")) == []
    alone = notes(Policy.preset("paddle", {"sinkhorn": "megatron"}))
    assert any(line.startswith("sinkhorn: ") for line in alone) and not any("swiglu" in line for line in alone)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny-fp32", "--numerics", "fast"], "'fast' is unknown"),
        (["tiny-fp32", "--against", "fast"], "'fast' is unknown"),
        (["tiny-fp32", "--numerics", "paddle", "--write"], "--write replaces"),
        (["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words, says):
    result = CliRunner().invoke(app, ["ulps", *words])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and says in result.stderr
