"""The fused rotary embedding against its definition in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import BOUNDS, fused, normal, plant, run  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.ops.rope import plain_rope  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(shape, rotary, dtype="float32"):
    paddle.seed(0)
    angle = 6.0 * paddle.rand([shape[0], rotary // 2])
    return normal(*shape, dtype=dtype), paddle.cos(angle), paddle.sin(angle)


def is_the_rotation(x, cos, sin, inverse=False):
    """Output and gradient of x; the tables get none."""
    static = {"inverse": inverse}
    ours, seeds = run(lambda x, **s: fused("rope")(x, cos, sin, **s), [x], static)
    tables = cos.astype("float64"), sin.astype("float64")
    truth, _ = run(lambda x, **s: plain_rope(x, *tables, **s), [x.astype("float64")], static, seeds)
    bound = BOUNDS[str(x.dtype).split(".")[-1]]
    return all(np.linalg.norm(a.astype("float64").numpy() - t.numpy()) <= bound * np.linalg.norm(t.numpy())
               for a, t in zip(ours, truth, strict=True))


@pytest.mark.parametrize("shape, rotary", [([3, 24], 8), ([4, 2, 5, 24], 24), ([2, 9, 128], 64), ([2, 1, 33, 6], 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inverse", [False, True])
def test_it_is_the_definition(shape, rotary, dtype, inverse):
    assert is_the_rotation(*inputs(shape, rotary, dtype), inverse)


@pytest.mark.parametrize("argument, change", [("sign", lambda s: -s), ("P", lambda p: p - 2)])
def test_a_bug_is_seen(monkeypatch, argument, change):
    plant(monkeypatch, "_rotate", argument, change)
    assert not is_the_rotation(*inputs([3, 4, 24], 8))


def test_the_other_dimensions_and_the_input_stay():
    x, cos, sin = inputs([3, 4, 24], 8)
    x[0, 0, 0], x[1, 0, 1] = float("nan"), float("inf")  # beside numbers that they must not touch
    before = x.numpy().copy()
    y = fused("rope")(x, cos, sin).numpy()
    assert np.array_equal(y[..., :16], before[..., :16], equal_nan=True) and np.isfinite(y[..., 16:]).all()
    assert np.array_equal(x.numpy(), before, equal_nan=True) and not np.array_equal(y[..., 16:], before[..., 16:])


def test_there_and_back_and_the_same_bits():
    x, cos, sin = inputs([5, 3, 16], 16)
    back = fused("rope")(fused("rope")(x, cos, sin), cos, sin, inverse=True)
    assert np.allclose(back.numpy(), x.numpy(), atol=1e-6)
    assert np.array_equal(*(fused("rope")(x, cos, sin).numpy() for _ in range(2)))


def test_an_odd_head_is_refused():
    with pytest.raises(UserError, match="even"):
        fused("rope")(paddle.zeros([2, 3, 7]), paddle.zeros([2, 2]), paddle.zeros([2, 2]))
