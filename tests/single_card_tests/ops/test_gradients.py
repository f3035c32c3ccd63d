"""Every hand-written backward against a numerical gradient in float64, to 1e-6."""

import numpy as np
import paddle
import pytest

from paddledsv4.numerics.registry import load_all

OPS = load_all()
CASES = {}


def case(op, **static):
    """Register the decorated maker of tensors as inputs for ``op`` with the static arguments."""

    def register(make):
        CASES[f"{op}-{make.__name__}"] = (op, make, static)
        return make

    return register


def normal(*shape):
    return paddle.randn(list(shape), dtype="float64")


@case("rms_norm", eps=1e-6)
def weighted():
    return [normal(3, 2, 6), normal(6)]


@case("head_norm", eps=1e-6)
def heads():
    return [normal(3, 2, 2, 6)]


@case("rope")
def four_dimensions():
    return [normal(4, 2, 2, 6), normal(4, 2), normal(4, 2)]


@case("rope", inverse=True)
def inverse():
    return [normal(4, 2, 6), normal(4, 2), normal(4, 2)]


@case("compress", ratio=2, overlap=True)
def overlapping_windows():
    return [normal(7, 2, 6), normal(7, 2, 6), normal(2, 6)]


@case("compress", ratio=3, overlap=False)
def plain_windows():
    return [normal(7, 2, 3), normal(7, 2, 3), normal(3, 3)]


@case("sinkhorn", iterations=5, eps=1e-3, dtype="float64")
def matrices():
    return [normal(2, 2, 3, 3)]


@case("hc_project", eps=1e-3)
def projections():
    return [normal(3, 2, 8), normal(5, 8)]


@case("swiglu", limit=1.0)
def clamped_and_weighted():
    return [normal(5, 8) * 2, normal(5)]


@case("swiglu", limit=1.0)
def clamped_alone():
    return [normal(5, 8) * 2, None]


@case("cross_entropy")
def token_losses():
    return [normal(3, 2, 5), paddle.to_tensor([[0, 4, 2], [1, 1, 3]])]


@case("sparse_attention", window=3, ratio=0, scale=0.6)
def window_only():
    return [normal(7, 2, 2, 4), normal(7, 2, 4), None, None, normal(2)]


@case("sparse_attention", window=3, ratio=2, scale=0.6)
def all_compressed():
    return [normal(7, 2, 2, 4), normal(7, 2, 4), normal(3, 2, 4), None, normal(2)]


@case("sparse_attention", window=3, ratio=2, scale=0.6)
def selected():
    index = OPS["indexer_topk"].variants["paddle"].function(normal(2, 7, 3), 2, 2)
    return [normal(7, 2, 2, 4), normal(7, 2, 4), normal(3, 2, 4), index, normal(2)]


@case("indexer_score")
def scores():
    return [normal(5, 2, 3, 4), normal(2, 2, 4), normal(5, 2, 3)]


def _indexer_inputs():
    index_scores = normal(2, 7, 3)
    index = OPS["indexer_topk"].variants["paddle"].function(index_scores, 2, 2)
    fixed = [normal(7, 2, 2, 4), normal(7, 2, 4), normal(3, 2, 4), normal(2)]
    return [index_scores, *(x.detach() for x in fixed), index]


@case("indexer_loss", window=3, ratio=2, scale=0.6, coeff=0.7, sparse=True)
def sparse():
    return _indexer_inputs()


@case("indexer_loss", window=3, ratio=2, scale=0.6, coeff=0.7, sparse=False)
def dense():
    return _indexer_inputs()


@case("loss_mean", seed=1.0, factor=1.0)
def masked():
    return [normal(2, 3), (normal(2, 3) > 0).astype("float64")]


CONSTANT_INPUTS = {"indexer_loss": 1, "rope": 1, "loss_mean": 1}  # only the first so many tensors get a gradient


def is_float(x) -> bool:
    return x is not None and x.dtype == paddle.float64


def objective(function, tensors, static, weights):
    out = function(*tensors, **static)
    out = out if isinstance(out, tuple) else (out,)
    return sum((x * w).sum() for x, w in zip(out, weights, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_backward(name):
    paddle.seed(7)
    op, make, static = CASES[name]
    function, tensors = OPS[op].variants["paddle"].function, make()
    out = function(*tensors, **static)
    weights = [normal(*x.shape) for x in (out if isinstance(out, tuple) else (out,))]
    moving = [i for i, x in enumerate(tensors) if is_float(x)][: CONSTANT_INPUTS.get(op)]
    for i in moving:
        tensors[i].stop_gradient = False
    objective(function, tensors, static, weights).backward()
    analytic = [tensors[i].grad.numpy() for i in moving]
    for i, gradient in zip(moving, analytic, strict=True):
        base, numeric, h = tensors[i].numpy(), np.zeros(gradient.size), 1e-5
        for k in range(base.size):
            values = []
            for sign in (1, -1):
                moved = base.copy()
                moved.reshape(-1)[k] += sign * h
                shifted = [paddle.to_tensor(moved) if j == i else x for j, x in enumerate(tensors)]
                with paddle.no_grad():
                    values.append(float(objective(function, shifted, static, weights)))
            numeric[k] = (values[0] - values[1]) / (2 * h)
        error = np.linalg.norm(numeric - gradient.reshape(-1)) / max(np.linalg.norm(numeric), 1e-12)
        assert error < 1e-6, f"argument {i}: {error:.1e}"


def test_every_hand_written_backward_has_a_case():
    differentiable = {
        op.name for op in OPS.values() if hasattr(op.variants["paddle"].function, "forward_and_backward")
    }
    assert differentiable - {name.split("-")[0] for name in CASES} == {"attach_loss"}  # its seed is no gradient


def test_a_wrong_backward_is_found(monkeypatch):
    """The numerical check fails on a planted bug: the clamp's gradient forgotten."""
    from paddledsv4.numerics.function import differentiable
    from paddledsv4.numerics.registry import Variant

    right = OPS["swiglu"].variants["paddle"].function

    @differentiable
    def leaky(x, prob, limit):
        out, backward = right.forward_and_backward(x, prob, limit)
        return out, lambda dy: (backward(dy)[0] + 1e-3, *backward(dy)[1:])

    monkeypatch.setitem(OPS["swiglu"].variants, "paddle", Variant("paddle", leaky, "planted"))
    with pytest.raises(AssertionError):
        test_backward("swiglu-clamped_and_weighted")
