"""`--check-finite full` and `align repro`, as a user meets them; files that are damaged."""

import json
import os
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from layouts import configs
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from align.cli import app
from align.repro import rerun
from paddledsv4.cli import main
from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.observe.replay import Call
from paddledsv4.observe.reproduction import KEY, Origin, Reproduction, read

ORIGIN = Origin(
    op="linear", path="decoder.layers.0.x", step=3, microbatch=1, rank=0, direction="forward", variant="paddle",
    precision="fp32", found="found",
)  # fmt: skip


def recipe(folder: Path, **sections) -> Path:
    """A run whose first update is so large that the second step overflows."""
    model, training = configs(steps=5, gradient_accumulation_steps=1)
    training = training.model_dump(mode="json")
    training["optimizer"] |= {"lr": 1e30}
    (np.arange(600, dtype="<u2") % model.vocab_size).tofile(folder / "tokens.bin")
    values = {"model": model.model_dump(mode="json"), "training": training, "numerics": "paddle",
              "data": {"tokens": "tokens.bin"}, "output": str(folder / "run")}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | sections))
    return folder / "recipe.yaml"


def train(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments)])
    return ended.value.code or 0


def test_a_run_that_overflows(tmp_path, capsys):
    assert train("--config", recipe(tmp_path), "--check-finite", "full") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 2, microbatch 0: decoder.") and " gave " in error
    (file,) = (tmp_path / "run").glob("nonfinite-*.safetensors")
    assert error.endswith(f"see align repro {file}")
    steps = (tmp_path / "run" / "train.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["step"] for line in steps] == [1]

    result = CliRunner().invoke(app, ["repro", str(file)])
    assert result.exit_code == 1, result.output
    origin = read(file).origin
    assert f"{origin.op} of {origin.path}, step 2, microbatch 0, rank 0, fp32, variant paddle" in result.stdout
    assert "numbers are not finite" in result.stdout or "not fin" in result.stdout
    as_json = json.loads(CliRunner().invoke(app, ["repro", str(file), "--numerics", "megatron", "--json"]).stdout)
    assert as_json["op"] == origin.op and {row["variant"] for row in as_json["results"]} == {"paddle", "megatron"}
    assert any(row["not_finite"] for row in as_json["results"])


@pytest.mark.parametrize(
    ("arguments", "observe", "code"),
    [
        ((), {}, 2),
        (("--check-finite", "off"), {}, 0),
        ((), {"check_finite": "off"}, 0),
        ((), {"check_finite": False}, 0),  # what yaml makes of a bare off
    ],
)
def test_losses_are_checked_unless_switched_off(tmp_path, capsys, arguments, observe, code):
    assert train("--config", recipe(tmp_path, observe=observe), "--steps", 3, *arguments) == code
    assert ("training stopped before this step is saved" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize(
    ("observe", "said"),
    [
        ({"check_finite": "all"}, "observe.check_finite = 'all': must be 'off', 'loss' or 'full'"),
        ({"trace_attention": {"steps": "5:2"}}, "'5:2': must be steps from 1 on and spans of them"),
        ({"trace_attention": {"layer": "*"}}, "observe.trace_attention.layer is not a known key; did you mean layers?"),
    ],
)
def test_what_the_section_may_say(tmp_path, capsys, observe, said):
    assert train("--config", recipe(tmp_path, observe=observe)) == 2
    assert said in capsys.readouterr().err


def a_call(*shapes, **kwargs) -> Call:
    random = np.random.default_rng(0)
    args = [paddle.to_tensor(random.standard_normal(s), "float32", stop_gradient=False) for s in shapes]
    return Call("linear", "decoder.layers.0.x", args, kwargs, True)


def test_what_goes_in_comes_out(tmp_path):
    x = paddle.to_tensor([1.0, 2.0]).astype("bfloat16")
    y = paddle.to_tensor(3.5, stop_gradient=False)
    args = [x, [y, None], (1, -0.0, True, "float32"), float("inf"), Group("data"), paddle.float32]
    call = Call("linear", "p", args, {"k": paddle.arange(3)}, True, {0: paddle.ones([2])})
    path = Reproduction(call, ORIGIN, {0: x, 1: 2.5}, {1: y}).write(tmp_path / "a" / "x.safetensors")
    back = read(path)
    assert back.origin == ORIGIN and back.call.in_graph
    a, (b, none), plain, inf, group, dtype = back.call.args
    assert a.dtype == paddle.bfloat16 and a.stop_gradient and not b.stop_gradient and b.shape == []
    assert none is None and repr(plain) == repr(args[2]) and inf == float("inf") and dtype == paddle.float32
    assert isinstance(group, Group) and group.size == 1
    assert back.call.kwargs["k"].tolist() == [0, 1, 2] and back.call.gradients[0].tolist() == [1, 1]
    assert back.outputs[1] == 2.5 and back.gradients[1].item() == 3.5
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_variants_are_held_against_the_first(tmp_path):
    call = a_call([3, 4], [5, 4])
    call.gradients[0] = paddle.ones([3, 5])
    call.args[0] = paddle.where(call.args[0] == call.args[0].max(), paddle.full([1], float("nan")), call.args[0])
    call.args[0].stop_gradient = False
    found = rerun(Reproduction(call, ORIGIN), None, ["megatron"])
    assert [(g.variant, g.name) for g in found] == [
        (variant, name) for variant in ("paddle", "megatron") for name in ("out", "gradient of x", "gradient of weight")
    ]
    assert [bool(g.wrong) for g in found] == [True, False, True] * 2
    nan = found[3].distance  # both variants give NaN at the same places: not equal
    assert nan.equal < nan.elements and nan.max == np.inf and nan.largest == np.inf
    assert found[4].distance.max < 10


def test_what_cannot_run_alone(tmp_path):
    with pytest.raises(UserError, match="exchanged tensors with 1 other ranks, so it cannot run alone"):
        rerun(Reproduction(a_call([3, 4], [5, 4]), ORIGIN.replace(ranks=2)))
    with pytest.raises(UserError, match="op nothing is no op of this"):
        rerun(Reproduction(a_call([3, 4], [5, 4]), ORIGIN.replace(op="nothing")))
    with pytest.raises(UserError, match="variant paddle of linear refuses these arguments"):
        rerun(Reproduction(a_call([3, 4], [5, 7]), ORIGIN))


@pytest.fixture
def file(tmp_path) -> Path:
    return Reproduction(a_call([3, 4], [5, 4]), ORIGIN).write(tmp_path / "x.safetensors")


def said(file, *arguments) -> str:
    result = CliRunner().invoke(app, ["repro", str(file), *arguments])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    error = result.stderr
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_wrong_choices(file):
    assert "op linear has no variant 'nope'; it has: paddle" in said(file, "--variant", "nope")
    assert "numerics 'nope' is unknown; choose one of: paddle" in said(file, "--numerics", "nope")
    assert "there is no such file" in said(file.with_name("none"))


def test_damaged_files(file):
    data = file.read_bytes()
    for cut in range(0, len(data), 97):
        file.write_bytes(data[:cut])
        assert "is damaged or no reproduction of an op" in said(file)
    file.write_bytes(os.urandom(400))
    assert "is damaged" in said(file)
    save_file({"a": np.ones(2)}, file)
    assert "is no reproduction of an op; --check-finite full writes such files" in said(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=9),
        lambda d: d.pop("args"),
        lambda d: d["origin"].pop("op"),
        lambda d: d["origin"].update(evil=1),
        lambda d: d.update(args={"tensor": "nowhere", "wants_gradient": True}),
        lambda d: d.update(args={"list": [{"unknown": "lock"}]}),
        lambda d: d.update(args=7),
        lambda d: d["origin"].update(precision="fp99"),
    ],
)
def test_damaged_descriptions(file, change):
    with safe_open(file, "np") as opened:
        described = json.loads(opened.metadata()[KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(described)
    save_file(tensors, file, {KEY: json.dumps(described)})
    said(file)
