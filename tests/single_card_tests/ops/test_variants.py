"""The native variants against the plain definitions in float64, values and gradients, on ragged sizes."""

import numpy as np
import paddle
import pytest

from paddledsv4.numerics.registry import load_all

OPS = load_all()


def normal(*shape):
    return paddle.randn(list(shape), dtype="float64")


def values_and_gradients(function, tensors, static):
    tensors = [x if x is None else x.detach() for x in tensors]
    for x in tensors:
        if x is not None and x.dtype == paddle.float64:
            x.stop_gradient = False
    out = function(*tensors, **static)
    out = out if isinstance(out, tuple) else (out,)
    paddle.seed(11)
    sum((x * normal(*x.shape)).sum() for x in out).backward()
    gradients = [x.grad for x in tensors if x is not None]
    return [x.numpy() for x in out], [None if g is None else g.numpy() for g in gradients]


def assert_same(op, tensors, **static):
    variants = OPS[op].variants
    ours = values_and_gradients(variants["paddle"].function, tensors, static)
    plain = values_and_gradients(variants["plain"].function, tensors, static)
    for a, b in zip(ours[0] + ours[1], plain[0] + plain[1], strict=True):
        if a is not None and b is not None:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 4, 16, 22])
@pytest.mark.parametrize("kind", ["window", "all", "selected"])
def test_sparse_attention(length, kind):
    paddle.seed(length)
    groups, ratio = max(length // 4, 1), 4
    compressed = None if kind == "window" else normal(groups, 2, 6)
    index = None
    if kind == "selected":
        index = OPS["indexer_topk"].variants["paddle"].function(normal(2, length, groups), 3, ratio)
    tensors = [normal(length, 2, 3, 6), normal(length, 2, 6), compressed, index, normal(3)]
    assert_same("sparse_attention", tensors, window=4, ratio=ratio, scale=0.5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_sparse_attention_in_chunks(rows, monkeypatch):
    """Any cut of the rows gives the same result."""
    import paddledsv4.ops.sparse_attention as module

    monkeypatch.setattr(module, "CHUNK_NUMBERS", rows * 100)
    paddle.seed(3)
    index = OPS["indexer_topk"].variants["paddle"].function(normal(2, 22, 5), 3, 4)
    for compressed, selected in ((None, None), (normal(5, 2, 6), None), (normal(5, 2, 6), index)):
        tensors = [normal(22, 2, 3, 6), normal(22, 2, 6), compressed, selected, normal(3)]
        assert_same("sparse_attention", tensors, window=4, ratio=4, scale=0.5)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_indexer_loss(is_sparse):
    paddle.seed(5)
    scores = normal(2, 22, 5)
    index = OPS["indexer_topk"].variants["paddle"].function(scores, 3, 4)
    tensors = [scores, normal(22, 2, 3, 6), normal(22, 2, 6), normal(5, 2, 6), normal(3), index]
    assert_same("indexer_loss", tensors, window=4, ratio=4, scale=0.5, coeff=0.7, sparse=is_sparse)


def test_sinkhorn_is_doubly_stochastic():
    matrix = OPS["sinkhorn"].variants["paddle"].function(normal(5, 2, 4, 4), 20, 1e-6, "float64").numpy()
    np.testing.assert_allclose(matrix.sum(-2), 1.0, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(-1), 1.0, atol=1e-3)


def test_indexer_topk_is_causal():
    index = OPS["indexer_topk"].variants["paddle"].function(normal(1, 9, 2), 2, 4).numpy()[0]
    assert (index[:3] == -1).all()
    assert sorted(index[3]) == [-1, 0]
    assert sorted(index[7]) == [0, 1]


def test_hadamard_is_its_own_inverse():
    x = normal(3, 8)
    rotate = OPS["hadamard"].variants["paddle"].function
    np.testing.assert_allclose(rotate(rotate(x)).numpy(), x.numpy(), atol=1e-12)


def test_attached_loss_gets_its_own_seed():
    x, loss = normal(3), normal(1)
    x.stop_gradient = loss.stop_gradient = False
    out = OPS["attach_loss"].variants["paddle"].function(x, loss, 0.25)
    assert np.array_equal(out.numpy(), x.numpy())
    (out * 3.0).sum().backward()
    assert x.grad.numpy().tolist() == [3.0] * 3
    assert loss.grad.numpy().tolist() == [0.25]
