"""The fused compressor pooling against its definition in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import fused, is_the_definition, normal, plant, run, same_bits  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.kernels import compress as kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(20, 1, 8, 4, True), (23, 2, 12, 4, True), (10, 1, 40, 3, True), (26, 2, 20, 8, False), (11, 1, 6, 5, False),
          (3, 1, 8, 4, True)]  # tokens, batch, head dim, ratio, overlap


def inputs(tokens, batch, width, ratio, overlap, dtype="float32"):
    paddle.seed(0)
    wide = width * (1 + overlap)
    tensors = [normal(tokens, batch, wide, dtype=dtype), normal(tokens, batch, wide, dtype=dtype), normal(ratio, wide)]
    return tensors, {"ratio": ratio, "overlap": overlap}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_definition(shape, dtype):
    tensors, static = inputs(*shape, dtype=dtype)
    if shape[0] < shape[3]:  # no group: nothing comes out, and the gradients are zero
        results, _ = run(fused("compress"), tensors, static)
        assert results[0].shape[0] == 0 and not any(np.any(g.astype("float32").numpy()) for g in results[1:])
    else:
        assert is_the_definition("compress", "plain", tensors, static)


def test_many_windows_to_a_program(monkeypatch):
    monkeypatch.setitem(kernel.BACKWARD, "PROGRAMS", 2)
    assert is_the_definition("compress", "plain", *inputs(30, 2, 8, 4, True))


@pytest.mark.parametrize("name", ["_forward", "_backward"])
@pytest.mark.parametrize("argument, change", [("ape", lambda a: a * 0.5), ("D", lambda d: d - 1),
                                              ("groups", lambda g: g - 1)])
def test_a_bug_is_seen(monkeypatch, name, argument, change):
    plant(monkeypatch, name, argument, change)
    assert not is_the_definition("compress", "plain", *inputs(20, 1, 8, 4, True))


def test_windows_that_no_program_has_are_seen(monkeypatch):
    monkeypatch.setitem(kernel.BACKWARD, "PROGRAMS", 2)
    plant(monkeypatch, "_backward", "each", lambda each: each - kernel.BACKWARD["WARPS"])
    assert not is_the_definition("compress", "plain", *inputs(30, 2, 8, 4, True))


def test_scores_of_minus_infinity():
    tensors, static = inputs(12, 1, 8, 4, False)
    tensors[1][:2] = float("-inf")
    assert is_the_definition("compress", "plain", tensors, static)


def test_every_run_gives_the_same_bits():
    assert same_bits("compress", *inputs(23, 2, 12, 4, True, dtype="bfloat16"))
