"""Products with packed weights in one kernel, against the weights' definition in float64."""

from unittest import mock

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from packed import trainer  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.config import LoraConfig  # noqa: E402
from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.fusions import packed_linear as module  # noqa: E402
from paddledsv4.kernels import packed_linear as kernel  # noqa: E402
from paddledsv4.numerics.policy import Policy  # noqa: E402
from paddledsv4.weights import mxfp4  # noqa: E402

COUNTS = [[5], [3, 0, 40, 33, 1, 0], [0, 0, 2]]
SHAPES = [(64, 64), (40, 96), (136, 160)]  # out, in; the second and the third have tiles that are not whole
BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3}
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(shape, counts, dtype):
    out, width = shape
    rng = np.random.default_rng(out)
    packed = rng.integers(-128, 128, (len(counts), out, width // 2)).astype("int8")
    scales = rng.integers(118, 124, (len(counts), out, width // 32)).astype("uint8")
    rows = (rng.standard_normal((sum(counts), n)).astype("float32") for n in (width, out))
    x, dy = (paddle.to_tensor(a).astype(dtype) for a in rows)
    return x, dy, packed, scales


def results(x, dy, packed, scales, counts):
    x = x.detach()
    x.stop_gradient = False
    weights = [[paddle.to_tensor(a) for a in arrays] for arrays in (packed, scales)]
    y = module.grouped_packed_linear(x, paddle.to_tensor(counts), *weights)
    y.backward(dy)
    return [t.astype("float64").numpy() for t in (y, x.grad)]


def definition(x, dy, packed, scales, counts):
    x, dy = (np.split(t.astype("float64").numpy(), np.cumsum(counts)[:-1]) for t in (x, dy))
    weights = mxfp4.dequantize(packed, scales).astype("float64")
    return (np.concatenate([a @ w.T for a, w in zip(x, weights, strict=True)]),
            np.concatenate([a @ w for a, w in zip(dy, weights, strict=True)]))  # fmt: skip


def error(ours, truth):
    return np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, truth, strict=True)])


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("shape", "counts"), list(zip(SHAPES, COUNTS, strict=True)), ids=str)
def test_it_is_the_definition(shape, counts, dtype):
    """With experts that have no rows, odd sizes, and groups that no tile divides."""
    given = inputs(shape, counts, dtype)
    assert error(results(*given, counts), definition(*given, counts)) <= BOUNDS[dtype]


def test_runs_are_alike_and_no_rows_are_none():
    given = inputs((24, 64), COUNTS[1], "bfloat16")
    for a, b in zip(results(*given, COUNTS[1]), results(*given, COUNTS[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    given = inputs(SHAPES[0], [0, 0], "float32")
    assert [t.shape for t in results(*given, [0, 0])] == [(0, 64), (0, 64)]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # 6 x 2^127 is infinite, times 0 is NaN
def test_every_byte_under_every_scale_is_exact():
    """Read out by products with one: every product but one has a factor 0, as have the other numbers of the row."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8)
    for low, high in ((0, 16), (237, 253)):  # from 2^-127, a subnormal number, to the last one without infinities
        scales = np.repeat(np.arange(low, high, dtype=np.uint8), 4)[:, None].repeat(4, 1)
        packed = codes.reshape(4, 64)[np.tile(np.arange(4), high - low)]
        exact = mxfp4.dequantize(packed, scales)
        y = module.grouped_packed_linear(paddle.eye(128), paddle.to_tensor([128]), [paddle.to_tensor(packed)],
                                         [paddle.to_tensor(scales)])  # fmt: skip
        np.testing.assert_array_equal(y.numpy(), exact.T)


@pytest.mark.parametrize("plant", ["scales", "next expert", "counts"])
def test_a_planted_bug_is_found(plant, monkeypatch):
    """Scales that are all one, every expert's weight taken from the next one, a row counted to the wrong expert."""
    plain, ones = kernel._launch, paddle.full([1 << 16], 127, "uint8")

    def planted(carrier, function, rows, weights, scales, counts, *sizes, **more):
        if plant == "scales":
            scales = paddle.full_like(scales, ones.data_ptr())
        if plant == "next expert":
            weights = weights.roll(1)
        if plant == "counts":
            counts = counts + paddle.to_tensor([-1, 1, 0, 0, 0, 0])
        return plain(carrier, function, rows, weights, scales, counts, *sizes, **more)

    given = inputs((24, 64), COUNTS[1], "bfloat16")
    assert error(results(*given, COUNTS[1]), definition(*given, COUNTS[1])) <= BOUNDS["bfloat16"]
    monkeypatch.setattr(kernel, "_launch", planted)
    assert not error(results(*given, COUNTS[1]), definition(*given, COUNTS[1])) <= 0.01


def test_refusals():
    x, _, packed, scales = inputs(SHAPES[0], [4], "float64")
    tensors = [paddle.to_tensor(packed[0])], [paddle.to_tensor(scales[0])]
    with pytest.raises(UserError, match="the fused packed_linear takes float32 or bfloat16"):
        module.grouped_packed_linear(x, paddle.to_tensor([4]), *tensors)
    with pytest.raises(UserError, match="rows of a multiple of 16 bytes, not 6 numbers of float32"):
        few = [tensors[0][0][:6]], [tensors[1][0][:6]]
        module.grouped_packed_linear(x.astype("float32"), paddle.to_tensor([4]), *few)
    with pytest.raises(ValueError, match="do not belong to packed weights"):
        module.grouped_packed_linear(x.astype("float32"), paddle.to_tensor([4]), tensors[0], [paddle.ones([64, 2])])
    with pytest.raises(ValueError, match="rows of 32 numbers do not fit"):
        module.grouped_packed_linear(paddle.zeros([4, 32]), paddle.to_tensor([4]), *tensors)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["plain", "adapters"])
def test_a_model_takes_it(lora, monkeypatch):
    """A step of a model with packed experts is the same up to rounding with this kernel, and did use it."""
    choose, found = Policy.follower, {}
    for name in ("paddle", "fused"):
        def follower(self, op, path="", name=name):
            return op.variants[name] if op is module.packed_product else choose(self, op, path)

        monkeypatch.setattr(Policy, "follower", follower)
        with mock.patch.object(kernel, "forward", wraps=kernel.forward) as used:
            runner = trainer("paddle", lora=lora)
            found[name] = [(r.losses[0].main, r.grad_norm) for r in runner.train(1)]
        assert bool(used.call_count) is (name == "fused")
    np.testing.assert_allclose(found["fused"], found["paddle"], rtol=1e-4)


def test_auto_takes_it_where_it_runs(monkeypatch):
    assert "packed_linear" in Policy.preset("auto").passed_over  # no GPU here
    assert Policy.preset("auto").follower(module.packed_product).name == "paddle"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Policy.preset("auto").follower(module.packed_product).name == "fused"
    assert Policy.preset("auto", {"linear": "megatron"}).follower(module.packed_product).name == "paddle"
    assert Policy.preset("paddle").follower(module.packed_product).name == "paddle"
