"""Profiles: the ops' times are theirs, no bit changes, and only the chosen steps of the chosen ranks are touched."""

import json
import time

import pytest
from checkpoints import numbers, small, state_bytes

from paddledsv4.config.profile import ProfileConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.function import differentiable
from paddledsv4.observe.profile.record import profile_path, with_profile
from paddledsv4.observe.profile.table import op_times
from paddledsv4.observe.profile.trace import read_trace, write_trace

PAUSE = 0.25  # seconds; far more than any op of this model takes, on a busy machine too


def profiled(runner, folder, first: int = 2, last: int = 2, steps: int = 3, ranks=(0,)) -> list:
    return list(with_profile(runner, runner.train(steps), ProfileConfig(ranks=ranks, steps=f"{first}:{last}"), folder))


def times_of(folder) -> dict:
    return {op.name: op for op in op_times(read_trace(profile_path(folder, 0))).ops}


@pytest.mark.parametrize(
    ("preset", "precision"),
    [("paddle", "fp32"), pytest.param("megatron", "fp32", marks=pytest.mark.slow), ("plain", "bf16")],
)
def test_no_bit_changes_and_every_op_has_its_time(tmp_path, preset, precision):
    plain, watched = small(preset, precision), small(preset, precision)
    assert numbers(profiled(watched, tmp_path)) == numbers(plain.train(3))
    assert state_bytes(watched) == state_bytes(plain)
    events = read_trace(profile_path(tmp_path, 0))
    times = op_times(events)
    ops = {op.name: op for op in times.ops}
    assert ops["sparse_attention"].calls == 3 and ops["adamw"].calls == len(watched.optimizer.states)
    for name in ("sparse_attention", "linear", "sinkhorn", "swiglu", "hc_gates", "permute", "cross_entropy", "rope"):
        assert ops[name].forward > 0 and ops[name].backward > 0, name
    assert ops["adamw"].backward == ops["router_topk"].backward == 0
    assert 0 < times.between < times.milliseconds
    # of all that autograd ran, only the reshapes between ops are nobody's
    nodes = {e["ts"]: e["name"] for e in events if e["name"].startswith("Global_")}
    nobodys = [name for ts, name in nodes.items() if ts not in {e["ts"] for e in events if e["cat"] == "backward"}]
    assert set(nobodys) == {"Global_ReshapeGradNode", "Global_UnsqueezeGradNode", "Global_GradNodeAccumulation"}
    assert {e["args"]["layer"] for e in events if e["name"] == "sinkhorn"} >= {
        "decoder.layers.0.mlp_hyper_connection", "mtp.layers.0.mtp_model_layer.self_attention_hyper_connection",
    }


def slow(kind: str):
    """Doubles its argument; forward takes half a pause, backward one, in the last node of autograd or further in."""

    @differentiable
    def pause(x):
        time.sleep(PAUSE / 2)

        def backward(gradient):
            time.sleep(PAUSE)
            return (gradient * 2,)

        return x * 2, backward

    return {"outer": lambda x: pause(x * 1.0), "inner": lambda x: pause(x) * 1.0 + 0.0}[kind]


@pytest.mark.parametrize("kind", ["outer", "inner"])
def test_a_slow_op_is_found_whichever_node_of_it_is_slow(tmp_path, kind):
    runner = small()
    for layer in (runner.model.decoder.layers[0], runner.model.decoder.layers[1]):
        norm = layer.pre_mlp_layernorm
        norm.ops.rms_norm = lambda x, *rest, original=norm.ops.rms_norm, **more: original(slow(kind)(x), *rest, **more)
    profiled(runner, tmp_path, first=1, last=1, steps=1)
    ops = times_of(tmp_path)
    assert ops["rms_norm"].backward / 1e3 >= 2 * PAUSE and ops["rms_norm"].forward / 1e3 >= PAUSE
    assert all(op.backward / 1e3 < PAUSE for name, op in ops.items() if name != "rms_norm")


def test_chrome_can_read_it(tmp_path):
    profiled(small(), tmp_path, first=1, last=2, steps=2)
    trace = json.loads(profile_path(tmp_path, 0).read_text())
    meta = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "rank 0"}} in meta
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(meta) + len(complete) == len(trace["traceEvents"])
    assert all(isinstance(event["tid"], int) and event["dur"] >= 0 and event["ts"] > 1e15 for event in complete)
    assert not any("\t" in event["name"] for event in complete)
    steps = [event for event in complete if event["cat"] == "step"]
    assert [event["name"] for event in steps] == ["step 1", "step 2"]
    ops = [event for event in complete if event["cat"] in ("forward", "backward")]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    assert all(any(a <= e["ts"] and e["ts"] + e["dur"] <= b + 1 for a, b in spans) for e in ops)


def test_other_ranks_and_steps_are_not_touched(tmp_path):
    runner = small()
    results = runner.train(3)
    assert with_profile(runner, results, ProfileConfig(), tmp_path) is results
    assert with_profile(runner, results, ProfileConfig(ranks=(), steps="1:2"), tmp_path) is results
    assert not runner.observers
    table = runner.model.decoder.layers[0].mlp.router.ops
    before = dict(vars(table))
    for result in with_profile(runner, results, ProfileConfig(steps="2"), tmp_path):
        assert dict(vars(table)) == before, result.step
        assert profile_path(tmp_path, 0).exists() == (result.step >= 2)


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    runner = small()
    results = with_profile(runner, runner.train(9), ProfileConfig(steps="2:8"), tmp_path)
    for result in results:
        if result.step == 3:
            break
    results.close()
    assert op_times(read_trace(profile_path(tmp_path, 0))).steps == 2


def event(name, category, ts, dur, tid=0, **args):
    return {"ph": "X", "pid": 0, "tid": tid, "name": name, "cat": category, "ts": ts, "dur": dur, "args": args}


def test_times_add_up_by_hand():
    times = op_times([
        event("step 1", "step", 1e15, 10_000), event("step 2", "step", 1e15 + 20_000, 10_000),
        event("linear", "forward", 1e15 + 1000, 4000), event("linear", "backward", 1e15 + 21_000, 1000),
        event("all_reduce", "collective", 1e15 + 2000, 1500, group="data"),  # inside linear
        event("rope", "forward", 1e15 + 5000, 500), event("linear", "forward", 1e15 + 5500, 500),
        event("rope", "forward", 1e15 + 2000, 300, tid=1), event("matmul", "Operator", 1e15 + 1000, 900),
    ])  # fmt: skip
    assert [(op.name, op.calls, op.forward, op.backward) for op in times.ops] == [
        ("linear", 2, 3.0, 1.0), ("all_reduce (data)", 1, 1.5, 0.0), ("rope", 2, 0.8, 0.0)
    ]  # fmt: skip
    assert (times.steps, times.milliseconds) == (2, 20.0) and times.between == pytest.approx(20 - 6.3)


@pytest.mark.parametrize(("steps", "span"), [("5:8", (5, 8)), ("5", (5, 5)), ("1:10", (1, 10)), (None, (0, 0))])
def test_spans_of_steps(steps, span):
    config = ProfileConfig(steps=steps, ranks=(0, 3))
    assert config.span == span
    config.check(4, 10)


@pytest.mark.parametrize("steps", ["8:5", "0:5", "5:", ":8", "5:8:2", "x", "", " 5", "٣", "1" * 5000])
def test_bad_spans(steps):
    with pytest.raises(UserError, match="observe.profile.steps = .*: must be a step, or the first and the last one"):
        ProfileConfig(steps=steps)


def test_a_run_must_have_the_steps_and_the_ranks():
    with pytest.raises(UserError, match="observe.profile.steps = '5:11': must lie in 1 to 10"):
        ProfileConfig(steps="5:11").check(4, 10)
    with pytest.raises(UserError, match="observe.profile.ranks = .*: must be below 4"):
        ProfileConfig(steps="5:8", ranks=(0, 4)).check(4, 10)
    with pytest.raises(UserError, match="must be at least 0"):
        ProfileConfig(steps="5:8", ranks=(-1,))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": 3}', '{"traceEvents": []}', "[" * 100_000,
                                  '{"traceEvents": [{"ph": "X", "cat": "step"}]}', "\udcff"])  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"other.json: (is not a profile|cannot be read)"):
        read_trace(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "none.json")


def test_a_trace_is_written_whole(tmp_path):
    with pytest.raises(TypeError):
        write_trace(tmp_path / "profile" / "rank0.json", [{"name": object()}])
    assert list((tmp_path / "profile").iterdir()) == []
