"""The finite guard: it names the first call at fault, keeps it as a file, and changes no bit."""

import gc
import math
import weakref

import numpy as np
import paddle
import pytest
from checkpoints import numbers, small, state_bytes, train
from planted import SpoiltGradient, layer_at, plant, spoilt

from align.repro import rerun
from paddledsv4.config.observe import ObserveConfig
from paddledsv4.observe.guard import FiniteGuard
from paddledsv4.observe.losses import NotFinite
from paddledsv4.observe.ops import OpObserver, watch_ops
from paddledsv4.observe.reproduction import read
from paddledsv4.observe.run import observing

FULL, LOSS, OFF = (ObserveConfig(check_finite=name) for name in ("full", "loss", "off"))
ATTENTION = "decoder.layers.1.self_attention"
MLP = "decoder.layers.1.mlp"
TWO = {"gradient_accumulation_steps": 2}


def stopped(runner, folder, steps: int = 4, config=FULL) -> str:
    """What the guard says, after which nothing of it is left."""
    before = [dict(vars(layer.ops)) for layer in [runner.model, *runner.model.sublayers()] if hasattr(layer, "ops")]
    with pytest.raises(NotFinite) as error, observing(runner, config, folder):
        for _ in runner.train(steps):
            pass
    assert [dict(vars(x.ops)) for x in [runner.model, *runner.model.sublayers()] if hasattr(x, "ops")] == before
    assert runner.observers == []
    return str(error.value)


@pytest.mark.parametrize("check", ["full", "loss"])
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("paddle", "fp32"), pytest.param("megatron", "fp32", marks=pytest.mark.slow), ("paddle", "bf16")],
)
def test_no_bit_changes(tmp_path, preset, precision, check):
    plain, guarded = small(preset, precision, **TWO), small(preset, precision, **TWO)
    with observing(guarded, ObserveConfig(check_finite=check), tmp_path):
        assert numbers(guarded.train(2)) == numbers(plain.train(2))
    assert state_bytes(guarded) == state_bytes(plain)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("path", "op", "index"),
    [
        (f"{ATTENTION}.core_attention", "sparse_attention", 0),
        (f"{MLP}.router", "router_logits", 0),
        ("decoder.layers.0.mlp_hyper_connection", "hc_gates", 1),
        ("", "cross_entropy", 0),
    ],
)
def test_forward(tmp_path, path, op, index, value):
    runner = small(**TWO)
    calls_a_step = 4 if op == "cross_entropy" else 2  # MTP's losses too
    plant(runner.model, path, op, 2 * calls_a_step, "forward", value, index)
    said = stopped(runner, tmp_path)
    assert said.startswith(f"step 2, microbatch 1: {path or 'model'}: {op} gave ")
    assert ": 1 of " in said and f"({value} at [" in said and "its arguments are finite" in said
    assert "run again alone it gives finite numbers" in said  # planted in one call only
    (file,) = tmp_path.iterdir()
    assert file.name == "nonfinite-step2-rank0.safetensors" and said.endswith(f"see align repro {file}")
    recorded = read(file)
    assert (recorded.origin.op, recorded.origin.step, recorded.origin.microbatch) == (op, 2, 1)
    assert int((~np.isfinite(recorded.outputs[index].numpy())).sum()) == 1


@pytest.mark.parametrize("preset", ["paddle", "megatron"])
@pytest.mark.parametrize(
    ("path", "op", "index", "what"),
    [
        (f"{ATTENTION}.core_attention", "sparse_attention", 0, "query"),
        (f"{ATTENTION}.core_attention", "sparse_attention", 4, f"parameter {ATTENTION}.core_attention.attn_sink"),
        (f"{ATTENTION}.linear_q_down_proj", "linear", 1, f"parameter {ATTENTION}.linear_q_down_proj.weight"),
        (f"{ATTENTION}.linear_proj", "linear", 0, "x"),
        ("decoder.layers.0.self_attention_hyper_connection", "sinkhorn", 0, "logits"),
    ],
)
def test_backward(tmp_path, preset, path, op, index, what):
    runner = small(preset, **TWO)
    plant(runner.model, path, op, 3, "backward", index=index)
    said = stopped(runner, tmp_path)
    assert said.startswith(f"step 2, microbatch 0: backward of {path}: {op} gave the gradient of {what}, float32 [")
    assert ": 1 of " in said and "those it received are finite" in said
    (file,) = tmp_path.iterdir()
    recorded = read(file)
    assert recorded.origin.direction == "backward" and recorded.call.gradients
    assert all(np.isfinite(g.numpy()).all() for g in recorded.call.gradients.values())
    assert all(np.isnan(g.numpy()).sum() == 1 for g in recorded.gradients.values())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_head_and_loss_in_one(tmp_path, direction):
    """The fused op is no switch, but it is watched all the same."""
    runner = small(linear_cross_entropy=True)
    plant(runner.model, "", "linear_cross_entropy", 3, direction, ever=True)
    said = stopped(runner, tmp_path)
    back = direction == "backward"
    what = "the gradient of hidden" if back else "loss"
    assert f"{'backward of ' if back else ''}model: linear_cross_entropy gave {what}, float32" in said
    (file,) = tmp_path.iterdir()
    assert {given.variant for given in rerun(read(file))} >= {"paddle", "megatron"}


@pytest.mark.parametrize("ever", [True, False])
def test_of_several_users_the_one_that_repeats_it(tmp_path, ever):
    """Paddle's fan_out hands out the tensor itself: which of its users spoilt the sum shows when each runs alone."""
    runner, at = small("paddle"), f"{ATTENTION}.linear_kv_proj"
    plant(runner.model, at, "linear", 2, "backward", ever=ever)
    said = stopped(runner, tmp_path)
    if ever:
        assert said.startswith(f"step 2, microbatch 0: backward of {at}: linear gave the gradient of x, float32")
    else:
        assert f"{ATTENTION}.linear_q_down_proj: linear" in said and f"{at}: linear" in said and "one of" in said
        assert "run again alone each gives finite numbers" in said


def test_an_update_that_spoils_a_weight(tmp_path):
    """The op works in place: the file holds what it got, not what it left."""
    runner = small()
    states = len(runner.optimizer.states)
    plant(runner.model, "", "adamw", states + 3, "forward", index=0)
    said = stopped(runner, tmp_path)
    assert said.startswith("step 2, microbatch 0: model: adamw gave its argument 0, which it changes, float32")
    (file,) = tmp_path.iterdir()
    recorded = read(file)
    assert all(np.isfinite(x.numpy()).all() for x in recorded.call.args)
    assert np.isnan(recorded.outputs[0].numpy()).sum() == 1


def test_a_weight_that_was_not_finite_before(tmp_path):
    runner = small()
    weight = layer_at(runner.model, f"{ATTENTION}.linear_proj").weight
    paddle.assign(spoilt(weight, math.inf), weight)
    said = stopped(runner, tmp_path)
    at = f"{ATTENTION}.linear_proj"
    assert said.startswith(f"step 1, microbatch 0: {at}: linear was given parameter {at}.weight, float32")


def test_code_between_two_operations_forward(tmp_path):
    runner = small()
    layer_at(runner.model, MLP).register_forward_post_hook(lambda layer, inputs, output: spoilt(output, math.nan))
    said = stopped(runner, tmp_path)
    assert said.startswith("step 1, microbatch 0: decoder.layers.1.mlp_hyper_connection: hc_mix was given output")


def test_code_between_two_operations_backward(tmp_path):
    runner = small()
    at = f"{ATTENTION}.kv_layernorm"
    layer = layer_at(runner.model, at)
    layer.register_forward_post_hook(lambda layer, inputs, output: SpoiltGradient.apply(output, math.nan))
    said = stopped(runner, tmp_path)
    assert f"the gradient that arrives at result 0 of {at}: rms_norm, float32" in said
    assert "no operation gave it" in said


def test_a_gradient_norm_that_overflows(tmp_path):
    runner = small()
    state = runner.optimizer.states[3]
    state.main_grad.fill_(3e38)
    said = stopped(runner, tmp_path)
    assert said.startswith("step 1, microbatch 0: model: grad_norm gave norm, float: it is inf; its arguments are fin")


def test_something_else_goes_wrong_after_a_nan(tmp_path):
    runner = small()
    plant(runner.model, f"{MLP}.router", "router_logits", 1, "forward")

    class Crash(OpObserver):
        def before(self, call):
            raise IndexError("an index that came from NaN")

    with watch_ops(runner.model, Crash(), {"cross_entropy"}):
        assert "router_logits gave" in stopped(runner, tmp_path)


def test_activations_are_let_go(tmp_path):
    """Hooks must not keep what a step computed: such a guard would end in an empty memory."""
    runner, alive = small(), []

    class Keep(OpObserver):
        def after(self, call, outputs):
            alive.extend(weakref.ref(x) for x in outputs if isinstance(x, paddle.Tensor))

    guard = FiniteGuard(runner, tmp_path)
    gc.disable()
    try:
        with guard.watching(), watch_ops(runner.model, Keep(), {"sparse_attention", "swiglu", "linear"}):
            for _ in runner.train(2):
                assert not guard._flow._edges
    finally:
        gc.enable()
    assert alive and not [x for x in alive if x() is not None]


@pytest.mark.parametrize("config", [FULL, LOSS])
def test_the_step_is_never_saved(tmp_path, config):
    expected = small(steps=4)
    train(expected, tmp_path / "clean", save_interval=1)
    runner = small(steps=4)
    plant(runner.model, f"{ATTENTION}.core_attention", "sparse_attention", 3, "forward")
    with pytest.raises(NotFinite), observing(runner, config, tmp_path / "out"):
        train(runner, tmp_path / "saved", save_interval=1)
    assert sorted(p.name for p in (tmp_path / "saved").glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    resumed = small(steps=4)
    train(resumed, tmp_path / "saved", str(tmp_path / "saved"), save_interval=1)
    assert state_bytes(resumed) == state_bytes(expected)


def test_losses_alone(tmp_path):
    runner = small(**TWO)
    plant(runner.model, "", "loss_mean", 7, "forward")  # main and MTP of two microbatches: the fourth call ends step 1
    said = stopped(runner, tmp_path, config=LOSS)
    assert said.startswith("step 2, microbatch 1, rank 0: the main loss is nan: training stopped before")
    assert "--check-finite full" in said and list(tmp_path.iterdir()) == []


def test_the_gradient_norm_counts_as_a_loss(tmp_path):
    runner = small()
    plant(runner.model, f"{ATTENTION}.core_attention", "sparse_attention", 1, "backward")
    assert "gradient norm is nan" in stopped(runner, tmp_path, config=LOSS)


def test_off_trains_on(tmp_path):
    runner = small()
    plant(runner.model, "", "loss_mean", 1, "forward")
    with observing(runner, OFF, tmp_path):
        results = list(runner.train(2))
    assert math.isnan(results[0].losses[0].main) and len(results) == 2
