"""Queries of a slice of the sequence, against all of its keys: the same rows as with all queries at once."""

import numpy as np
import paddle
import pytest

from paddledsv4.numerics.registry import load_all

OPS = load_all()
LENGTH, WINDOW, RATIO = 22, 4, 4
CUTS = [(0, 3), (3, 4), (4, 13), (13, 22)]  # within the first window, at its end, across several, to the end
VARIANTS = [
    (op, variant.name) for op in ("sparse_attention", "indexer_topk", "indexer_loss")
    for variant in OPS[op].variants.values() if not variant.missing()
]


def normal(*shape):
    return paddle.randn(list(shape), dtype="float64")


@pytest.fixture(autouse=True)
def seeded():
    paddle.seed(7)


def differentiated(function, tensors, **static):
    """The output, and the gradients of its sum of squares (None for what has none)."""
    tensors = [x if x is None else x.detach() for x in tensors]
    for x in tensors:
        if x is not None and x.is_floating_point():
            x.stop_gradient = False
    out = function(*tensors, **static)
    (out * out).sum().backward()
    return out.numpy(), [None if x is None or x.grad is None else x.grad.numpy() for x in tensors]


def attention_inputs(kind: str):
    compressed = None if kind == "window" else normal(LENGTH // RATIO, 2, 6)
    index = None
    if kind == "selected":
        index = OPS["indexer_topk"].variants["paddle"].function(normal(2, LENGTH, 5), 3, RATIO)
    return normal(LENGTH, 2, 3, 6), normal(LENGTH, 2, 6), compressed, index, normal(3)


def attention_by_slices(variant: str, kind: str, first_key=lambda a: max(a - WINDOW + 1, 0), shift: int = 0):
    """Output and gradients of all queries at once, and put together from slices with keys from ``first_key`` on.

    ``shift`` is a planted bug: keys and entries of other positions.
    """
    query, kv, compressed, index, sink = attention_inputs(kind)
    function = OPS["sparse_attention"].variants[variant].function
    static = {"window": WINDOW, "ratio": RATIO, "scale": 0.5}
    whole = differentiated(function, [query, kv, compressed, index, sink], **static)
    outs, dquery, dkv, shared = [], [], np.zeros(kv.shape), []
    for a, b in CUTS:
        near, last = kv[max(first_key(a) - shift, 0) : b - shift if a else b], b - shift if a else b
        tensors = [query[a:b], near, compressed, None if index is None else index[:, a:b], sink]
        out, gradients = differentiated(function, tensors, offset=a - shift if a else a, **static)
        outs.append(out)
        dquery.append(gradients[0])
        dkv[last - near.shape[0] : last] += gradients[1]
        shared.append(gradients[2:])
    sums = [None if g[0] is None else sum(g) for g in zip(*shared, strict=True)]
    return whole, (np.concatenate(outs), [np.concatenate(dquery), dkv, *sums])


@pytest.mark.parametrize("kind", ["window", "all", "selected"])
@pytest.mark.parametrize("first_key", [lambda a: max(a - WINDOW + 1, 0), lambda a: max(a - 6, 0), lambda a: 0])
@pytest.mark.parametrize("variant", [name for op, name in VARIANTS if op == "sparse_attention"])
def test_sparse_attention(variant, kind, first_key):
    """With the keys of the first query's window, with a few more, with all."""
    whole, parts = attention_by_slices(variant, kind, first_key)
    np.testing.assert_allclose(parts[0], whole[0], 1e-12, 1e-13)
    for ours, expected in zip(parts[1], whole[1], strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(ours, expected, 1e-11, 1e-12)


@pytest.mark.parametrize("kind", ["window", "all"])
@pytest.mark.parametrize("variant", [name for op, name in VARIANTS if op == "sparse_attention"])
def test_a_wrong_offset_is_seen(variant, kind):
    whole, parts = attention_by_slices(variant, kind, shift=1)
    assert np.abs(parts[0] - whole[0]).max() > 1e-3


def test_sparse_attention_of_a_slice_in_chunks(monkeypatch):
    import paddledsv4.ops.sparse_attention as module

    monkeypatch.setattr(module, "CHUNK_NUMBERS", 1)
    for kind in ("window", "all", "selected"):
        test_sparse_attention("paddle", kind, lambda a: max(a - 6, 0))


@pytest.mark.parametrize("variant", [name for op, name in VARIANTS if op == "indexer_topk"])
def test_indexer_topk(variant):
    function, scores = OPS["indexer_topk"].variants[variant].function, normal(2, LENGTH, 5)
    whole = function(scores, 3, RATIO).numpy()
    parts = [function(scores[:, a:b], 3, RATIO, offset=a).numpy() for a, b in CUTS]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
    assert (function(scores[:, 13:], 3, RATIO).numpy() != parts[-1]).any()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("variant", [name for op, name in VARIANTS if op == "indexer_loss"])
def test_indexer_loss_is_a_mean_over_queries(variant, sparse):
    query, kv, compressed, index, sink = attention_inputs("selected")
    scores, function = normal(2, LENGTH, 5), OPS["indexer_loss"].variants[variant].function
    static = {"window": WINDOW, "ratio": RATIO, "scale": 0.5, "coeff": 0.7, "sparse": sparse}

    def loss(a, b, offset):
        student = scores[:, a:b].detach()
        student.stop_gradient = False
        out = function(student, query[a:b], kv[:b], compressed, sink, index[:, a:b], offset=offset, **static)
        out.sum().backward()
        share = (b - a) / LENGTH
        return out.item() * share, student.grad.numpy() * share

    value, gradient = loss(0, LENGTH, 0)
    parts = [loss(a, b, a) for a, b in CUTS]
    np.testing.assert_allclose(sum(v for v, _ in parts), value, 1e-12)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts], 1), gradient, 1e-11, 1e-14)
    assert np.isclose(loss(4, 13, 5)[0], parts[2][0], 1e-6) == sparse  # a choice of entries has no position
