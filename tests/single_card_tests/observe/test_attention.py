"""Traces of attention: six tensors per layer that fit together, and not a bit of the run changed."""

import json

import numpy as np
import paddle
import pytest
from checkpoints import numbers, small, state_bytes
from planted import layer_at, plant
from safetensors import safe_open
from safetensors.paddle import load_file, save_file
from typer.testing import CliRunner

from align.cli import app
from paddledsv4.config.observe import ObserveConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import PRESETS
from paddledsv4.numerics.registry import load_all
from paddledsv4.observe.attention import TENSORS
from paddledsv4.observe.losses import NotFinite
from paddledsv4.observe.run import observing

AT = "decoder.layers.1.self_attention"
ALL = ("decoder.layers.0", "decoder.layers.1", "mtp.layers.0.mtp_model_layer")


def tracing(layers: str = "*", steps: str = "2") -> ObserveConfig:
    return ObserveConfig.from_dict({"trace_attention": {"layers": layers, "steps": steps}})


def traced(folder, preset="paddle", precision="fp32", layers="*", steps="2", plan=lambda model: None, **changes):
    """A run of two steps, and its trace of step 2."""
    runner = small(preset, precision, gradient_accumulation_steps=2, **changes)
    plan(runner.model)
    with observing(runner, tracing(layers, steps), folder):
        results = numbers(runner.train(2))
    return runner, results, folder / "trace" / "step000002-rank0.safetensors"


@pytest.mark.parametrize("preset", ["paddle", pytest.param("megatron", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_changes_and_everything_is_there(tmp_path, preset, precision):
    plain = small(preset, precision, gradient_accumulation_steps=2)
    expected = numbers(plain.train(2))
    runner, results, file = traced(tmp_path, preset, precision)
    assert results == expected and state_bytes(runner) == state_bytes(plain) and runner.observers == []
    assert [p.name for p in (tmp_path / "trace").iterdir()] == ["step000002-rank0.safetensors"]
    tensors = load_file(file)
    assert set(tensors) == {f"mb{i}/{at}.self_attention.{name}" for i in (0, 1) for at in ALL for name in TENSORS}
    for tensor in tensors.values():
        assert tensor.dtype == (paddle.bfloat16 if precision == "bf16" else paddle.float32)
        assert np.isfinite(tensor.astype("float32").numpy()).all()


def test_off_leaves_nothing(tmp_path):
    runner = small()
    with observing(runner, ObserveConfig(), tmp_path):
        list(runner.train(1))
    assert list(tmp_path.iterdir()) == [] and not any(layer._forward_post_hooks for layer in runner.model.sublayers())


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "torch"])
def test_the_tensors_fit_together(tmp_path, preset):
    """What is said to be before an op gives, through that op, what is said to be after it."""
    runner, _, file = traced(tmp_path, preset, steps="1", layers=f"{AT}.*")
    tensors = load_file(file.with_name("step000001-rank0.safetensors"))
    attention, ops = layer_at(small(preset).model, AT), runner.policy.ops(AT)
    query, key, core, unrotated, low, out = (tensors[f"mb1/{AT}.{name}"] for name in TENSORS)
    s, b, heads, dim = query.shape
    assert key.shape == [s, b, dim] and core.shape == [s, b, heads * dim] and unrotated.shape == core.shape
    cos, sin = attention.rotary.table(ops, s, "float32")
    back = ops.rope(core.reshape(query.shape), cos, sin, inverse=True)
    np.testing.assert_array_equal(back.reshape(core.shape).numpy(), unrotated.numpy())
    untouched = query.shape[-1] - cos.shape[-1] * 2
    assert (core.reshape(query.shape)[..., :untouched] == unrotated.reshape(query.shape)[..., :untouched]).all()
    assert (core != unrotated).any()
    weights = {n: p for n, p in layer_at(small(preset, gradient_accumulation_steps=2).model, AT).named_parameters()}
    again = ops.grouped_linear(unrotated, weights["linear_o_group_proj"], groups=attention.groups)
    np.testing.assert_array_equal(again.numpy(), low.numpy())
    np.testing.assert_array_equal(ops.linear(low, weights["linear_proj.weight"]).numpy(), out.numpy())


def test_layers_and_steps_are_chosen(tmp_path):
    runner = small(steps=10)
    with observing(runner, tracing("mtp.*", "1,3:4"), tmp_path):
        list(runner.train(5))
    names = sorted(p.name for p in (tmp_path / "trace").iterdir())
    assert names == [f"step00000{step}-rank0.safetensors" for step in (1, 3, 4)]
    with safe_open(tmp_path / "trace" / names[0], "np") as file:
        assert json.loads(file.metadata()["order"]) == [f"mb0/{ALL[2]}.self_attention.{name}" for name in TENSORS]
    with pytest.raises(UserError, match="matches no attention layer; there are: decoder.layers.0.self_attention, "):
        traced(tmp_path / "none", layers="encoder.*")


def test_a_step_that_is_not_finite_leaves_its_trace(tmp_path):
    runner = small()
    plant(runner.model, f"{AT}.core_attention", "sparse_attention", 2, "forward")
    with pytest.raises(NotFinite), observing(runner, tracing(), tmp_path):
        list(runner.train(3))
    tensors = load_file(tmp_path / "trace" / "step000002-rank0.safetensors")
    bad = [name for name in TENSORS if not np.isfinite(tensors[f"mb0/{AT}.{name}"].numpy()).all()]
    assert bad == ["core.out", "grouped_o.in", "grouped_o.out", "out"]


def compare(*files) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, files)])
    return result.exit_code, result.output


def test_align_compare_finds_the_first_that_differs(tmp_path):
    def wrong_rope(model):
        """The inverse rope of one layer does not turn back."""
        ops = layer_at(model, AT).ops
        rope = load_all()["rope"].variants["paddle"].function
        ops.rope = lambda x, cos, sin, inverse=False: rope(x, cos, sin)

    _, _, one = traced(tmp_path / "a")
    _, _, same = traced(tmp_path / "b")
    _, _, other = traced(tmp_path / "c", "plain")
    assert compare(one, same) == (0, "tensor_matches=36/36\nfirst_tensor_diff=None\n")
    code, said = compare(one, other)
    assert code == 1 and "ULP, relative L2" in said and f"first_tensor_diff=mb0/{ALL[0]}.self_attention" in said
    first = tmp_path / "d" / "trace" / "step000001-rank0.safetensors"
    traced(tmp_path / "d", steps="1")
    traced(tmp_path / "e", steps="1", plan=wrong_rope)
    code, said = compare(first, tmp_path / "e" / "trace" / first.name)
    assert code == 1 and said.splitlines()[-1] == f"first_tensor_diff=mb0/{AT}.grouped_o.in"


def test_align_compare_refuses_nan_and_what_is_not_there(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    x = {"x": paddle.to_tensor([1.0, float("nan")]), "y": paddle.zeros([2], "int64")}
    save_file(x, a)
    said = "x: has NaN: 1 in the reference, 1 in the candidate\ntensor_matches=1/2\nfirst_tensor_diff=x\n"
    assert compare(a, a) == (1, said)
    save_file({"y": paddle.zeros([2], "int64"), "z": paddle.zeros([1])}, b)
    assert "x: is missing in the candidate\nz: is not in the reference\n" in compare(a, b)[1]
    save_file({"x": paddle.zeros([3]), "y": paddle.zeros([2], "int32")}, b)
    code, said = compare(a, b)
    assert code == 1 and "x: is F32 [3], the reference's F32 [2]\n" in said
    assert "y: is I32 [2], the reference's I64 [2]\n" in said
    save_file({"x": paddle.to_tensor([0.0])}, a)
    save_file({"x": paddle.to_tensor([-0.0])}, b)
    assert compare(a, b)[0] == 1  # other bits
    save_file({}, a)
    assert compare(a, a)[0] == 1  # nothing was compared
    assert compare(tmp_path / "none.safetensors", a)[0] == 2
    b.write_bytes(b"nonsense")
    assert compare(a, b)[0] == 2
