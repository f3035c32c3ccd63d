"""The fused permutation and its inverse against their definitions."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from fused_checks import fused, is_the_definition, normal, plant, same_bits  # noqa: E402
from poison import poisoned  # noqa: E402, F401

from paddledsv4.numerics.registry import load_all  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def routing(tokens, experts, chosen):
    """Expert 2 has no token, token 1 no expert, and the last token one expert only."""
    paddle.seed(0)
    top = paddle.topk(paddle.rand([tokens, experts]), chosen)[1]
    routed = paddle.nn.functional.one_hot(top, experts).sum(1) > 0
    routed[:, 2] = False
    routed[1] = False
    routed[-1] = paddle.arange(experts) == experts - 1
    return routed


def inputs(tokens=35, experts=7, chosen=3, width=20, dtype="float32"):
    return [normal(tokens, width, dtype=dtype), paddle.rand([tokens, experts]), routing(tokens, experts, chosen)]


def token_index(**sizes):
    tensors = inputs(**sizes)
    return load_all()["permute"].variants["paddle"].function(*tensors)[2], tensors[0].shape[0]


@pytest.mark.parametrize("sizes", [{}, {"tokens": 3, "width": 3}, {"tokens": 33, "experts": 33, "width": 8}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_are_the_definitions(sizes, dtype):
    tensors = inputs(**sizes, dtype=dtype)
    assert is_the_definition("permute", "paddle", tensors, {})
    index, tokens = token_index(**sizes)
    assert np.array_equal(fused("permute")(*tensors)[2].numpy(), index.numpy())
    rows = normal(index.shape[0], 20, dtype=dtype)
    assert is_the_definition("unpermute", "paddle", [rows, index], {"tokens": tokens})


def test_no_assignment_at_all():
    x, probs = normal(4, 8), paddle.rand([4, 3])
    x.stop_gradient = probs.stop_gradient = False
    rows, row_probs, index = fused("permute")(x, probs, paddle.zeros([4, 3], "bool"))
    out = fused("unpermute")(rows, index, 4)
    (out.sum() + row_probs.sum()).backward()
    assert rows.shape == [0, 8] and not out.numpy().any() and not x.grad.numpy().any() and not probs.grad.numpy().any()


@pytest.mark.parametrize("kernel, argument, change", [
    ("_spread", "starts", lambda s: s * 0), ("_gather", "starts", lambda s: (s - 1).clip(min=0)),
    ("_assign", "probs", lambda p: p * 0.5), ("_assign", "by_expert", lambda t: t * 0),
    ("_dprobs", "dflat", lambda d: d.flip(0)),
])  # that keep within their memory
def test_a_bug_is_seen(monkeypatch, kernel, argument, change):
    plant(monkeypatch, kernel, argument, change)
    assert not is_the_definition("permute", "paddle", inputs(), {})


@pytest.mark.parametrize("kernel, argument", [("_gather", "lists"), ("_spread", "lists")])
def test_a_wrong_list_is_seen(monkeypatch, kernel, argument):
    index, tokens = token_index()
    plant(monkeypatch, kernel, argument, lambda rows: rows.flip(0))
    assert not is_the_definition("unpermute", "paddle", [normal(index.shape[0], 20), index], {"tokens": tokens})


def test_rows_add_in_their_order_whatever_the_atomics_gave(monkeypatch):
    """1e8 + 1 - 1e8 depends on the order: ascending rows give 0 in float32."""
    from paddledsv4.fusions.launcher import CARRIER

    launch = CARRIER.launch

    def reversed_lists(kernel, grid, *args, **meta):
        launch(kernel, grid, *args, **meta)
        if kernel.__name__ == "_list_tokens":
            lists = args[kernel.arg_names.index("lists")]
            paddle.assign(lists.flip(0), lists)

    monkeypatch.setattr(CARRIER, "launch", reversed_lists)
    rows, index = paddle.to_tensor([[1e8], [1.0], [-1e8]]), paddle.zeros([3], "int64")
    assert fused("unpermute")(rows, index, 1).numpy().tolist() == [[0.0]]


def test_every_run_gives_the_same_bits():
    assert same_bits("permute", inputs(dtype="bfloat16"), {})
