"""Packed experts compute what the same experts do unpacked, to the bit, and nothing unpacked is kept."""

import gc
import tracemalloc

import numpy as np
import paddle
import pytest
from packed import COMBINATIONS, cases, groups, trainer, unpacked_state

from paddledsv4.config import LoraConfig, TrainConfig
from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.fusions import packed_linear as module
from paddledsv4.moe.mxfp4 import PackedLinear, resident_bits
from paddledsv4.numerics.policy import Policy
from paddledsv4.transformer.build import Build
from paddledsv4.weights import mxfp4
from paddledsv4.weights.load import named_tensors, weights_md5


def pair(preset: str, precision: str, lora: LoraConfig | None = None):
    """Two trainers with the same numbers: packed, and unpacked beneath the same adapters."""
    packed = trainer(preset, precision, lora=lora)
    adapted = [name for name in named_tensors(packed.model) if ".lora_" in name]
    state = unpacked_state(packed.model)
    unpacked = trainer(preset, precision, packed=False, lora=lora,
                       initial_state={name: value for name, value in state.items() if name not in adapted})
    return packed, unpacked


@pytest.mark.parametrize(("preset", "precision"), [*COMBINATIONS, ("paddle", "fp64")])
def test_a_step_has_the_bits_of_unpacked_experts(preset, precision):
    """Losses, the norm of all gradients and the weights after three steps, of everything that is trained in both."""
    packed, unpacked = pair(preset, precision, LoraConfig(r=4))
    ours, theirs = ([(r.losses, r.grad_norm) for r in t.train(3)] for t in (packed, unpacked))
    assert ours == theirs and np.isfinite([norm for _, norm in ours]).all()
    assert len(packed.optimizer.states) == len(unpacked.optimizer.states) > 0
    for a, b in zip(packed.optimizer.states, unpacked.optimizer.states, strict=True):
        assert a.name == b.name and a.parameter.numpy().tobytes() == b.parameter.numpy().tobytes(), a.name
        assert a.m.numpy().tobytes() == b.m.numpy().tobytes(), a.name


def packed_layer(preset: str, precision: str = "fp32") -> PackedLinear:
    return next(x for x in trainer(preset, precision).model.sublayers() if isinstance(x, PackedLinear))


def scales_forgotten(packed, scales, dtype):
    return dequantize(packed, paddle.full_like(scales, 127), dtype)


def nibbles_swapped(packed, scales, dtype):
    bits = packed.numpy().view(np.uint8)
    return dequantize(paddle.to_tensor((bits >> 4 | bits << 4).view(np.int8)), scales, dtype)


dequantize = module.dequantize


@pytest.mark.parametrize("plant", [None, scales_forgotten, nibbles_swapped])
@pytest.mark.parametrize("case", groups("mxfp4_golden", r"gmm_\w+"))
def test_golden_products(case, plant, monkeypatch):
    """y and the gradient of x, expert by expert: within 1e-6 in float32, half a unit of bfloat16 above that."""
    if plant:
        monkeypatch.setattr(module, "dequantize", plant)
    golden = {key.split(".")[1]: t for key, t in cases("mxfp4_golden").items() if key.startswith(f"{case}.")}
    precision = "fp32" if golden["x"].dtype == paddle.float32 else "bf16"
    packed = packed_layer("paddle", precision)
    starts, worst = [0, *golden["offs"].tolist()], 0.0
    for expert, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        x = golden["x"][start:stop].clone()
        x.stop_gradient = False
        weight, scales = golden["packed"][expert], golden["scales_u8"][expert]
        whole = module.dequantize(weight, scales, str(x.dtype).split(".")[-1])
        if not plant:
            assert np.array_equal(whole.astype("float32"), golden["weight_dequant"][expert].astype("float32"))
        y = module.packed_linear(x, weight, scales, linear=packed.ops.linear, dx=packed.dx)
        (dx,) = paddle.grad([y], [x], [golden["grad_out"][start:stop]])
        for ours, theirs in ((y, golden["y"]), (dx, golden["grad_x"])):
            a, b = (t.astype("float32").numpy() for t in (ours, theirs[start:stop]))
            worst = max(worst, float((np.abs(a - b) / (np.abs(b) + np.abs(b).mean())).max())) if a.size else worst
    limit = 1e-6 if precision == "fp32" else 2.0**-7
    assert (worst <= limit) is (plant is None), worst


@pytest.mark.filterwarnings("ignore:overflow")  # 6 x 2^127 is infinite
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_byte_under_every_scale_is_exact(dtype):
    """Also on the path for other devices, which makes no difference of dtype until its end."""
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(1, 256).repeat(255, 0)
    scales = np.arange(255, dtype=np.uint8)[:, None].repeat(16, 1)
    expected = mxfp4.dequantize(packed, scales)
    ours = dequantize(paddle.to_tensor(packed), paddle.to_tensor(scales), dtype).astype("float64").numpy()
    assert np.array_equal(ours, expected.astype(np.float64)) and np.isinf(ours).any()


def test_the_path_of_other_devices(monkeypatch):
    packed, scales = paddle.randint(-128, 128, [8, 32]).astype("int8"), paddle.full([8, 2], 120, "uint8")
    expected = dequantize(packed, scales, "float32").numpy()
    monkeypatch.setattr(module, "_on_cpu", lambda *_: pytest.fail("not the path for a CPU"))
    monkeypatch.setattr(paddle.base.libpaddle.Place, "is_cpu_place", lambda self: False)
    assert np.array_equal(dequantize(packed, scales, "float32").numpy(), expected)


def test_no_weight_without_its_scales():
    packed = paddle.zeros([4, 32], "int8")
    for scales in (paddle.ones([4, 1], "uint8"), paddle.ones([2, 2], "uint8"), paddle.ones([4, 2])):
        with pytest.raises(ValueError, match="do not belong to packed weights"):
            dequantize(packed, scales, "float32")


def live_floats(function) -> int:
    """Bytes of Paddle's and of numpy's that the graph of ``function()`` holds, beside its inputs and its result."""

    def current() -> int:
        return paddle.base.core.host_memory_stat_current_value("Allocated", 0) + tracemalloc.get_traced_memory()[0]

    def live() -> int:
        gc.collect()
        before = current()
        out = function()  # noqa: F841  (alive while the memory is looked at)
        return current() - before

    tracemalloc.start()
    with paddle.no_grad():
        alone = live()
    kept = live() - alone
    tracemalloc.stop()
    return kept


def keeps_the_weight(x, packed, scales, linear, dx):
    """The plain way: autograd keeps the unpacked weight."""
    return linear(x, dequantize(packed, scales, "float32"))


@pytest.mark.parametrize("preset", ["paddle", "megatron"])
def test_only_packed_tensors_are_kept_for_backward(preset):
    layer = packed_layer(preset)
    x = paddle.randn([64, 64])  # as large as the unpacked weight
    x.stop_gradient = False
    layer(x)  # what is cached once
    kept = live_floats(lambda: layer(x))
    assert kept < x.size  # a quarter of either, for the objects of the graph
    planted = live_floats(lambda: keeps_the_weight(x, layer.weight, layer.weight_scale, layer.ops.linear, layer.dx))
    assert planted >= layer.weight.size * 2 * 4


def test_packed_experts_take_no_optimizer_state_and_stay_as_they_are():
    runner = trainer()
    before = weights_md5(runner.model, lambda name: "local_experts" in name)
    assert not [s.name for s in runner.optimizer.states if "local_experts" in s.name]
    assert len({r.losses[0].main for r in runner.train(2)}) == 2
    assert weights_md5(runner.model, lambda name: "local_experts" in name) == before
    assert resident_bits(runner.model) == 4.25


def test_refusals():
    with pytest.raises(UserError, match="multiple of 32, .*local_experts.0.linear_fc2 has 40"):
        trainer(moe_intermediate_size=40)
    build = Build(trainer().model.config, Policy.preset("paddle"))
    with pytest.raises(UserError, match="parallel.expert_tensor = 2: must be 1"):
        PackedLinear(build, 64, 64, Group("expert_tensor", (0, 1)))
    with pytest.raises(UserError, match="training.expert_weight_format = 'fp4'"):
        TrainConfig.from_dict({"expert_weight_format": "fp4"} | {"sequence_length": 1, "micro_batch_size": 1,
                              "steps": 1, "optimizer": {"lr": 1e-3}})  # fmt: skip
    state = {name: t.numpy() for name, t in named_tensors(trainer().model).items()}
    lost = next(name for name in state if name.endswith("weight_scale"))
    del state[lost]
    with pytest.raises(UserError, match=f"weights: {lost} missing"):
        trainer(initial_state=state)
