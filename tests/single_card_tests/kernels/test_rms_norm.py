"""The fused normalisations against their definitions in float64."""

import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import fused, is_the_definition, normal, plant, same_bits  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [[1, 16], [5, 37], [2, 19, 64], [40, 24]]
BUGS = [("_forward", "eps", lambda _: 1.0), ("_backward", "eps", lambda _: 1.0),
        ("_add_parts", "count", lambda n: n - 1)]


def inputs(shape, dtype):
    paddle.seed(0)
    return [normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_are_the_definition(shape, dtype):
    x, weight = inputs(shape, dtype)
    assert is_the_definition("rms_norm", "plain", [x, weight], {"eps": 1e-6})
    assert is_the_definition("head_norm", "plain", [x], {"eps": 1e-6})


@pytest.mark.parametrize("kernel, argument, change", BUGS)
def test_a_bug_is_seen(monkeypatch, kernel, argument, change):
    plant(monkeypatch, kernel, argument, change)
    assert not is_the_definition("rms_norm", "plain", inputs([40, 24], "float32"), {"eps": 1e-6})


def test_rows_of_zeros_and_views():
    x, weight = inputs([6, 32], "float32")
    x[2] = 0.0
    assert is_the_definition("rms_norm", "plain", [x[:, 8:24], weight[8:24]], {"eps": 1e-6})


def test_every_run_gives_the_same_bits():
    assert same_bits("rms_norm", inputs([70, 40], "bfloat16"), {"eps": 1e-6})


def test_what_it_cannot_do_is_said():
    with pytest.raises(UserError, match="float32 and bfloat16, not float64"):
        fused("rms_norm")(*inputs([2, 4], "float64"), 1e-6)
    with pytest.raises(UserError, match="at most 32768"):
        fused("head_norm")(paddle.zeros([1, 32769]), 1e-6)
