"""The fused sparse attention against its definition in float64, on poisoned memory."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import plant  # noqa: E402
from poison import poisoned_nearby  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.fusions.launcher import CARRIER  # noqa: E402
from paddledsv4.kernels import sparse_attention as kernel  # noqa: E402
from paddledsv4.kernels.inverted_index import KeyGradients  # noqa: E402
from paddledsv4.numerics.registry import load_all  # noqa: E402
from paddledsv4.ops.sparse_attention import plain_sparse_attention  # noqa: E402

fused = load_all()["sparse_attention"].variants["fused"].function
STATIC = {"window": 3, "ratio": 2, "scale": 0.5}
NAMES = ("out", "dquery", "dkv", "dcompressed", "dsink")


pytestmark = pytest.mark.usefixtures("poisoned_nearby")


@pytest.fixture(autouse=True)
def seeded():
    paddle.seed(3)


def inputs(kind="selected", rows=5, batch=1, heads=3, d=6, groups=3, before=0, dtype="float32"):
    """Queries of ``rows`` positions behind ``before`` keys, and the gradient of their output."""
    selected, compressed = None, None
    if kind != "window":
        compressed = paddle.randn([groups, batch, d])
    if kind == "selected":
        selected = np.full([batch, rows, 2], -1, "int32")
        for b, i in np.ndindex(batch, rows):
            chosen = np.random.default_rng(b * rows + i).permutation(min((before + i + 1) // 2, groups))[:2]
            selected[b, i, : len(chosen)] = chosen
        selected = paddle.to_tensor(selected)
    shapes = [rows, batch, heads, d], [before + rows, batch, d], [heads], [rows, batch, heads * d]
    query, kv, sink, dout = (paddle.randn(shape) for shape in shapes)
    query, kv, dout = (x.astype(dtype) for x in (query, kv, dout))
    return [query, kv, compressed if compressed is None else compressed.astype(dtype), selected, sink, dout]


def run(function, tensors, dtype=None, **static):
    """Output and gradients as float64, None where there is no compressed entry."""
    cast = [x if x is None or not x.is_floating_point() else x.astype(dtype or x.dtype).detach() for x in tensors]
    *leaves, dout = cast
    for x in leaves:
        if x is not None and x.is_floating_point():
            x.stop_gradient = False
    out = function(*leaves, **STATIC | static)
    out.backward(dout)
    found = [out, *(None if x is None else x.grad for i, x in enumerate(leaves) if i != 3)]
    return [None if x is None else x.astype("float64").numpy() for x in found]


def failures(ours, exact, bound):
    """Results whose relative norm error is over the bound; NaN is."""
    return [
        name for name, a, b in zip(NAMES, ours, exact, strict=True)
        if b is not None and not np.linalg.norm(a - b) <= bound * np.linalg.norm(b)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "window", "batch": 2},
        {"kind": "all", "d": 16},
        {"kind": "selected", "batch": 2, "rows": 7},
        {"kind": "selected", "heads": 17, "rows": 3},  # two blocks of heads
        {"kind": "all", "before": 4},
    ],
    ids=str,
)
def test_it_is_the_definition(change):
    tensors, offset = inputs(**change), change.get("before", 0)
    ours = run(fused, tensors, offset=offset)
    assert failures(ours, run(plain_sparse_attention, tensors, "float64", offset=offset), 2e-6) == []


def test_in_bfloat16():
    tensors = inputs(dtype="bfloat16")
    exact = run(plain_sparse_attention, tensors, "float64")
    assert failures(run(fused, tensors), exact, 1e-2) == []


def test_the_same_bits_again_and_with_the_queries_in_chunks(monkeypatch):
    tensors = inputs(rows=7, groups=2)
    whole = run(fused, tensors)
    again = run(fused, tensors)
    assert all((a == b).all() for a, b in zip(whole, again, strict=True))
    monkeypatch.setattr(kernel, "PART_NUMBERS", 3 * 2 * 16 * 6)  # three queries, two tiles of slots
    assert failures(run(fused, tensors), whole, 1e-6) == []


def test_rows_that_see_nothing():
    """No entry is chosen: its gradient is zero. The sink takes all: zeros everywhere, and nothing is NaN."""
    tensors = inputs()
    tensors[3] = paddle.full_like(tensors[3], -1)
    out, _, _, dcompressed, _ = run(fused, tensors)
    assert np.isfinite(out).all() and (dcompressed == 0).all()
    tensors[4] = tensors[4] + 300.0
    assert all((x == 0).all() for x in run(fused, tensors))


BUGS = {  # kernel, argument, what it becomes; results that are wrong then
    "forward without the sink": ("_forward", "sink", lambda sink: sink - 1e4, {"out", "dquery", "dsink"}),
    "weights of the backward too small": ("_backward", "lse", lambda lse: lse + 0.01, {"dquery", "dkv"}),
    "the index of other queries": ("_place", "first", lambda first: first + 1, {"dcompressed"}),
    "the last query's part is lost": ("_add", "rows", lambda rows: rows - 1, {"dkv"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    *where, found = BUGS[bug]
    tensors = inputs()
    exact = run(plain_sparse_attention, tensors, "float64")
    plant(monkeypatch, *where)
    assert found <= set(failures(run(fused, tensors), exact, 2e-6))


def test_what_it_does_not_take_is_said():
    tensors = inputs(d=6)[:5]
    with pytest.raises(UserError, match="the query is float64.*choose sparse_attention=paddle"):
        fused(*(x if x is None or not x.is_floating_point() else x.astype("float64") for x in tensors), **STATIC)
    with pytest.raises(UserError, match="head dim 1024"):
        fused(paddle.zeros([1, 1, 1, 1024]), paddle.zeros([1, 1, 1024]), None, None, paddle.zeros([1]), **STATIC)


def key_gradients(parts, held):
    """The sums over parts [rows, 1, window, D] of windows alone."""
    rows, _, window, d = parts.shape
    like = paddle.zeros([rows, 1, 1, d]), paddle.zeros([rows, 1, d])
    keys = KeyGradients(CARRIER, *like, None, None, window, 1, 0, window, held)
    keys.index(0, rows)
    keys.add(paddle.to_tensor(parts), 0, rows)
    return keys.results()[0].numpy()


def test_parts_may_stand_in_the_order_of_a_matrix_unit():
    """hopper_backward._as_held: four lanes hold pairs of 32 columns in turn, and each writes its own together."""
    parts = np.random.default_rng(0).normal(size=[5, 1, 4, 64]).astype("float32")
    pairs = parts.reshape([5, 1, 4, 2, 4, 4, 2])  # .., blocks of 32, pairs of a lane, lanes, columns of a pair
    held = np.ascontiguousarray(pairs.swapaxes(-3, -2)).reshape(parts.shape)
    np.testing.assert_array_equal(key_gradients(held, True), key_gradients(parts, False))
    assert not np.array_equal(key_gradients(held, False), key_gradients(parts, False))
