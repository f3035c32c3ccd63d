"""align locate: planted bugs are named, clean runs raise no alarm. The whole suite is slow; its table is in docs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from locating import search
from plants import BUGS
from typer.testing import CliRunner

from align.cli import app
from align.locate.distance import Error, Noise, describe, same_bits
from align.locate.show import as_dict, verdict

pytest.importorskip("torch", reason="the reference is the torch preset")

BY_NAME = {bug.name: bug for bug in BUGS}
QUICK = [  # one of a kind: a cast, a shift, the optimizer, the graph, a gradient, one bit, a choice
    "router logits cast early", "MTP roll off by one", "wrong beta2", "query cut off from the graph",
    "sink gradient missing", "last bit of the norm", "causal mask of the indexer missing",
]  # fmt: skip


def find(bug, precision):
    search(precision, bug.preset)  # the reference must be recorded before the bug is there
    with bug.plant():
        return search(precision, bug.preset)


def test_a_clean_run_raises_no_alarm():
    found = search("fp32", "paddle")
    assert found.first is None and "no fault" in verdict(found)
    assert {"result", "gradient"} <= {event.what for event in found.events}
    assert any(event.error and 0 < event.error.equal < 1 for event in found.events), "the presets do round differently"


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_named(name):
    found = find(BY_NAME[name], "fp32")
    assert found.first is not None and found.first.op == BY_NAME[name].op, verdict(found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["paddle", "plain", "megatron", "torch"])
def test_no_preset_raises_an_alarm(precision, preset):
    assert search(precision, preset).first is None


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.95), ("bf16", 0.85)])
def test_the_whole_suite(precision, share):
    bugs = [bug for bug in BUGS if precision in bug.precisions]
    firsts = {bug.name: find(bug, precision).first for bug in bugs}
    missed = [bug.name for bug in bugs if firsts[bug.name] is None or firsts[bug.name].op != bug.op]
    assert len(bugs) >= 30 and len(missed) <= (1 - share) * len(bugs), missed


# ---- the judge alone


def tensor(values, dtype="float32"):
    return paddle.to_tensor(np.asarray(values, "float32")).astype(dtype)


def test_nan_and_shapes_never_pass():
    noise = Noise(rms=1.0, peak=1.0, scale=1.0)
    for ours in (tensor([1.0, float("nan")]), tensor([1.0]), tensor([1.0, float("inf")]), None):
        assert noise.excess(Error.of(ours, tensor([1.0, 2.0])), 2.0**-24) > 0.9
    both = Error.of(tensor([1.0, float("nan")]), tensor([1.0, float("nan")]))
    assert both.equal == 0.5 and np.isinf(noise.excess(both, 0.0))
    assert "not finite" in describe(None, None, both, np.inf)
    assert np.isinf(noise.excess(Error.of(tensor([float("nan")]), tensor([1.0])), 0.0))


def test_a_variant_that_gives_nan_excuses_no_other():
    """Such a variant was a legal computation too, once, and every other NaN lay within its noise."""
    reference, spoilt = tensor([1.0, 2.0]), Error.of(tensor([1.0, float("nan")]), tensor([1.0, 2.0]))
    noise = Noise()
    noise.add(spoilt)
    assert np.isinf(noise.excess(spoilt, 2.0**-24))
    choices = Error.of(paddle.to_tensor([1, 3]), paddle.to_tensor([1, 2]))
    noise.add(choices)
    assert noise.excess(choices, 0.0) == 0.0 and np.isinf(noise.excess(spoilt, 0.0))
    assert noise.excess(Error.of(reference, reference), 0.0) == 0.0


def test_a_traced_nan_is_no_match(tmp_path, monkeypatch):
    from align.bundle import load_bundle
    from align.hashing import tensor_md5
    from align.locate import trace_check

    class Traced:
        forward = {"logits": np.array([1.0, np.nan], np.float32), "embedding.out": np.ones(2, np.float32)}
        gradients = {}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    bundle = load_bundle("tiny-fp32")
    (tmp_path / "trace").mkdir()
    described = {name: [[2], "torch.float32", tensor_md5(x)] for name, x in Traced.forward.items()}
    (tmp_path / "trace" / "forward.json").write_text(json.dumps(described))
    (tmp_path / "trace" / "activation_grads.json").write_text("{}")
    monkeypatch.setattr(trace_check, "Tracer", lambda model: Traced())
    monkeypatch.setattr(trace_check, "microbatch_gradients", lambda *arguments: None)
    monkeypatch.setattr(trace_check, "taps_of", lambda model: [])
    trainer = SimpleNamespace(model=None, parallel=bundle.parallel, precision="fp32")
    check = trace_check.check_trace(replace(bundle, path=tmp_path), trainer)
    assert (check.compared, check.equal, check.first) == (2, 1, "forward logits")


def test_equal_bits():
    assert same_bits(tensor([1.0]), tensor([1.0])) and not same_bits(tensor([0.0]), tensor([-0.0]))
    assert not same_bits(tensor([1.0]), tensor([1.0], "float64")) and not same_bits(tensor([1.0]), 1.0)
    assert same_bits([tensor([1.0]), 2], [tensor([1.0]), 2]) and not same_bits([1], [1, 1])
    nan = float("nan")
    assert not same_bits(tensor([1.0, nan]), tensor([1.0, nan])) and not same_bits(nan, nan)
    assert not same_bits(tensor([nan], "bfloat16"), tensor([nan], "bfloat16"))


def test_a_small_bias_shows_among_larger_roundings():
    """In bfloat16 a scale of one thousandth hides in every single rounding, not in ten thousand of them."""
    random = np.random.default_rng(0)
    reference = random.standard_normal(10000)
    noise = Noise()
    noise.add(Error.of(tensor(reference * (1 + 2.0**-9 * random.uniform(-1, 1, 10000))), tensor(reference)))
    rounded = tensor(reference * (1 + 2.0**-9 * random.uniform(-1, 1, 10000)))
    biased = tensor(reference * (1.001 + 2.0**-9 * random.uniform(-1, 1, 10000)))
    assert noise.excess(Error.of(rounded, tensor(reference)), 2.0**-24) < 2
    assert noise.excess(Error.of(biased, tensor(reference)), 2.0**-24) > 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x, "identical"),
        (lambda x: x * 1.01, "scale error of +1.0000%"),
        (lambda x: x * (1 + 0.01 * np.arange(len(x))[:, None]), "row to row"),
        (lambda x: tensor(x, "bfloat16").astype("float32").numpy(), "too early"),
        (lambda x: -x[::-1], "wrong"),
    ],
)
def test_verdicts(change, says):
    reference = np.random.default_rng(3).standard_normal((8, 16))
    ours = tensor(change(reference))
    error = Error.of(ours, tensor(reference))
    assert says in describe(ours, tensor(reference), error, 1e9)


# ---- the command


def test_the_command_names_the_op_and_writes_what_the_report_reads(tmp_path, monkeypatch):
    from align.report.inputs import read_distances

    found = search("fp32", "paddle")
    monkeypatch.setattr("align.locate.run.locate", lambda *args: found)
    monkeypatch.setattr("align.locate.trace_check.check_trace", lambda *args: None)
    monkeypatch.setattr("align.locate.run.trainer_of", lambda bundle: lambda policy: None)
    result = CliRunner().invoke(app, ["locate", "tiny-fp32", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == json.loads((tmp_path / "locate.json").read_text())
    rows = read_distances(tmp_path)
    assert {row.direction for row in rows} == {"forward", "backward", "optimizer"} and len(rows) > 50
    found = find(BY_NAME["wrong beta2"], "fp32")
    assert as_dict(found, None)["first"]["op"] == "adamw"
    result = CliRunner().invoke(app, ["locate", "tiny-fp32"])
    assert result.exit_code == 1 and "first fault: step 1, model: adamw" in result.stdout
    result = CliRunner().invoke(app, ["locate", "nowhere"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
