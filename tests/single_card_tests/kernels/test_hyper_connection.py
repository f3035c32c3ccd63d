"""The fused operations of hyper-connections against their definitions in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import fused, is_the_definition, normal, plant, run, same_bits  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
SIZES = [(2, 2, 4, 40), (1, 1, 4, 16), (5, 1, 2, 33)]  # s, b, n, C


def project(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    return "hc_project", "plain", [normal(s, b, n * width, dtype=dtype), normal(n * n + 2 * n, n * width)], {"eps": EPS}


def gates(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    m = n * n + 2 * n
    tensors = [normal(s, b, m), paddle.rand([s, b, 1]) + 0.5, *(normal(1) for _ in range(3)), normal(m)]
    static = {"streams": n, "eps": EPS, "dtype": dtype}
    return "hc_gates", "paddle", tensors, static, {"dtype": "float64"}


def sinkhorn(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    static = {"iterations": 20, "eps": EPS, "dtype": dtype}
    return "sinkhorn", "plain", [normal(s, b, n, n, scale=2)], static, {"dtype": "float64"}


def aggregate(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    return "hc_aggregate", "paddle", [normal(s, b, n * width, dtype=dtype), normal(s, b, n, dtype=dtype)], {}


def mix(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    shapes = [s, b, n, n], [s, b, n * width], [s, b, n], [s, b, width]
    return "hc_mix", "paddle", [normal(*shape, dtype=dtype) for shape in shapes], {}


def contract(s, b, n, width, dtype="float32"):
    paddle.seed(0)
    tensors = [normal(s, b, n * width, dtype=dtype), normal(n, n * width, scale=0.1), normal(n), normal(1)]
    return "hc_contract", "paddle", tensors, {"eps": EPS}


OPS = [project, gates, sinkhorn, aggregate, mix, contract]
HALF = lambda x: x * 0.5  # noqa: E731
BUGS = [
    (project, "_project", "w", HALF), (project, "_project", "each", lambda k: k - 64),
    (project, "_finish", "COUNT", lambda n: n - 1), (project, "_finish", "K", lambda k: k - 1),
    (project, "_split", "x", HALF), (project, "_split_rows", "dr", HALF), (project, "_project_backward", "d", HALF),
    (project, "_add_parts", "count", lambda n: n - 1),
    (gates, "_forward", "eps", lambda _: 0.01), (gates, "_forward", "post", HALF),
    (gates, "_backward", "bias", HALF), (gates, "_finish", "count", lambda n: n - 1),
    (sinkhorn, "_forward", "eps", lambda _: 1e-3), (sinkhorn, "_backward", "eps", lambda _: 1e-3),
    (sinkhorn, "_forward", "ITERATIONS", lambda n: 3), (sinkhorn, "_backward", "ITERATIONS", lambda n: 3),
    (aggregate, "_aggregate", "h", HALF), (aggregate, "_aggregate_backward", "C", lambda c: c - 1),
    (mix, "_mix", "h", lambda h: h.transpose([0, 2, 1]).contiguous()),
    (mix, "_mix_backward", "h", lambda h: h.transpose([0, 2, 1]).contiguous()),
    (mix, "_mix_backward", "post", HALF), (mix, "_mix_backward", "C", lambda c: c - 1),
    (contract, "_gate", "eps", lambda _: 0.01), (contract, "_aggregate", "h", HALF),
    (contract, "_gate_backward", "scale", HALF),
    (contract, "_project_backward", "gate", HALF), (contract, "_project_backward", "through", HALF),
    (contract, "_gate_finish", "total", HALF), (contract, "_add_parts", "count", lambda n: n - 1),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_it_is_the_definition(op, sizes, dtype):
    assert is_the_definition(*op(*sizes, dtype=dtype))


@pytest.mark.parametrize("op, kernel, argument, change", BUGS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_bug_is_seen(monkeypatch, op, kernel, argument, change):
    plant(monkeypatch, kernel, argument, change)
    assert not is_the_definition(*op(2, 2, 4, 40))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_run_gives_the_same_bits(op):
    name, _, tensors, static, *_ = op(2, 2, 4, 24, dtype="bfloat16")
    assert same_bits(name, tensors, static)


@pytest.mark.parametrize("op", [project, gates, sinkhorn])
def test_more_tokens_than_a_program_has(op):
    assert is_the_definition(*op(131, 1, 2, 16))


def test_the_projection_of_bfloat16_streams_has_float32_accuracy():
    name, _, (streams, weight), static = project(5, 1, 4, 100, dtype="bfloat16")
    proj, _ = fused(name)(streams, weight, **static)
    truth = streams.astype("float64").numpy() @ weight.astype("float64").numpy().T
    rounded = streams.astype("float64").numpy() @ weight.astype("bfloat16").astype("float64").numpy().T
    error = np.linalg.norm(proj.numpy() - truth) / np.linalg.norm(truth)
    assert error < 1e-6 and np.linalg.norm(rounded - truth) / np.linalg.norm(truth) > 1e-4


def test_a_row_of_zeros_gets_a_finite_gradient():
    name, _, (streams, weight), static = project(3, 1, 4, 16)
    streams[1] = 0.0
    results, _ = run(fused(name), [streams, weight], static)
    assert all(np.isfinite(x.numpy()).all() for x in results)


def test_sinkhorn_ends_on_columns_whatever_the_logits():
    logits = paddle.to_tensor([[[80.0, -80.0, 0.0, 3.0]] * 4, [[0.0] * 4] * 4])
    m = fused("sinkhorn")(logits, 20, EPS, "float32").numpy()
    assert np.allclose(m.sum(-2), 1.0, atol=1e-5) and np.isfinite(m).all()


def test_contraction_that_nobody_goes_on_from():
    _, _, tensors, static = contract(3, 1, 4, 16)
    streams = tensors[0].detach()
    streams.stop_gradient = False
    hidden, _ = fused("hc_contract")(streams, *tensors[1:], **static)
    hidden.sum().backward()
    assert np.isfinite(streams.grad.numpy()).all()


def test_other_numbers_of_streams_are_refused():
    with pytest.raises(UserError, match="power of two"):
        fused("hc_mix")(*(normal(*shape) for shape in ([1, 1, 3, 3], [1, 1, 12], [1, 1, 3], [1, 1, 4])))
