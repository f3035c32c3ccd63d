"""The fused indexer: scores against their definition in float64, and the choice against a stable sort."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import plant  # noqa: E402
from poison import poisoned_nearby  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.fusions.launcher import CARRIER  # noqa: E402
from paddledsv4.kernels import indexer_score as kernel  # noqa: E402
from paddledsv4.kernels import indexer_topk as choice  # noqa: E402
from paddledsv4.numerics.registry import load_all  # noqa: E402
from paddledsv4.ops.indexer import plain_indexer_score  # noqa: E402

OPS = load_all()
score = OPS["indexer_score"].variants["fused"].function
topk = OPS["indexer_topk"].variants["fused"].function


pytestmark = pytest.mark.usefixtures("poisoned_nearby")


@pytest.fixture(autouse=True)
def seeded():
    paddle.seed(3)


def inputs(rows=5, batch=2, heads=3, d=6, groups=7, dtype="float32"):
    shapes = [rows, batch, heads, d], [groups, batch, d], [rows, batch, heads], [batch, rows, groups]
    *tensors, dscores = (paddle.randn(shape) for shape in shapes)
    return [*(x.astype(dtype) for x in tensors), dscores]


def run(function, tensors, dtype=None):
    *leaves, dscores = (x.astype(dtype or x.dtype).detach() for x in tensors)
    for x in leaves:
        x.stop_gradient = False
    scores = function(*leaves)
    scores.backward(dscores)
    return [x.astype("float64").numpy() for x in (scores, *(x.grad for x in leaves))]


def right(ours, exact, bound):
    return all(np.linalg.norm(a - b) <= bound * np.linalg.norm(b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("change", [{}, {"rows": 1, "batch": 1}, {"heads": 16, "d": 16, "groups": 1},
                                    {"groups": 70, "rows": 3, "batch": 1}], ids=str)  # fmt: skip
def test_scores_are_the_definition(change):
    tensors = inputs(**change)
    ours = run(score, tensors)
    assert right(ours, run(plain_indexer_score, tensors, "float64"), 1e-6)
    assert all((a == b).all() for a, b in zip(ours, run(score, tensors), strict=True))


def test_scores_in_bfloat16():
    tensors = inputs(dtype="bfloat16")
    assert right(run(score, tensors), run(plain_indexer_score, tensors, "float64"), 1e-2)


def test_incomplete_entries_can_be_left_out():
    """Of a tile of entries the queries before its first complete one; their rows stay as they were: poisoned."""
    query, key, weights, _ = inputs(rows=9, batch=1)
    whole = score(query, key, weights).numpy()
    part = kernel.forward(CARRIER, query, key, weights, causal=(2, 1), BLOCK_G=16, ROWS=4).numpy()
    complete = np.arange(7) < (np.arange(9)[:, None] + 2) // 2
    np.testing.assert_array_equal(part[:, complete], whole[:, complete])
    later = kernel.forward(CARRIER, query, key, weights, causal=(4, 0), BLOCK_G=16, ROWS=4).numpy()
    assert np.isnan(later[:, :3]).all() and np.isfinite(later[:, 3:]).all()


@pytest.mark.parametrize("kernels, argument, change", [
    (["_backward_key"], "s", lambda s: s - 1), (["_forward", "_backward_query"], "scale", lambda _: 1.0),
], ids=["parts of one range", "weights not scaled"])  # fmt: skip
def test_a_planted_bug_in_the_scores_is_found(kernels, argument, change, monkeypatch):
    tensors = inputs()
    for name in kernels:
        plant(monkeypatch, name, argument, change)
    assert not right(run(score, tensors), run(plain_indexer_score, tensors, "float64"), 1e-6)


def chosen(scores: np.ndarray, kept: int, ratio: int, offset: int = 0) -> np.ndarray:
    """The definition: a stable sort of the complete entries, best first; then ascending, -1 behind."""
    b, s, g = scores.shape
    index = np.full([b, s, min(kept, g)], -1, np.int32)
    for i, row in np.ndindex(b, s):
        best = np.argsort(-scores[i, row, : (offset + row + 1) // ratio], kind="stable")[:kept]
        index[i, row, : len(best)] = np.sort(best)
    return index


def hard_scores():
    """With ties, zeros of both signs, infinities and denormal numbers."""
    scores = paddle.randn([2, 4, 20]).numpy().round(1)
    scores[0, 1, 3:9], scores[0, 2, :10], scores[1, 0, 2:5] = 0.0, -0.0, np.inf
    scores[0, 2, 2:6], scores[1, 3, 5:9], scores[1, 1] = 0.0, 1e-42, -np.inf
    return scores


@pytest.mark.parametrize("in_registers", [1 << 14, 8])
def test_the_choice_is_that_of_a_stable_sort(in_registers, monkeypatch):
    monkeypatch.setattr(choice, "IN_REGISTERS", max(in_registers, 16))
    scores = hard_scores()
    ours = topk(paddle.to_tensor(scores), 3, 1, offset=15).numpy()
    np.testing.assert_array_equal(ours, chosen(scores, 3, 1, 15))


def test_the_choice_is_causal():
    scores = paddle.randn([1, 9, 2])
    np.testing.assert_array_equal(topk(scores, 5, 4).numpy(), chosen(scores.numpy(), 5, 4))
    np.testing.assert_array_equal(topk(scores, 1, 4, offset=2).numpy(), chosen(scores.numpy(), 1, 4, 2))


def test_a_choice_of_later_ties_is_found():
    """A wrong rule, the highest entry first, is told from the right one by these scores."""
    scores = hard_scores()
    other = 19 - chosen(scores[..., ::-1], 3, 1, 99)
    assert (np.sort(other, -1) != chosen(scores, 3, 1, 99)).any()


def test_what_it_does_not_take_is_said():
    with pytest.raises(UserError, match="the query is float64.*choose indexer_score=paddle"):
        score(*(x.astype("float64") for x in inputs()[:3]))
    with pytest.raises(UserError, match="not float32; choose indexer_topk=paddle"):
        topk(paddle.randn([1, 2, 3], dtype="float64"), 1, 1)
