"""The fused head and loss against the formula in float64."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from poison import poisoned  # noqa: E402, F401

from paddledsv4.errors import UserError  # noqa: E402
from paddledsv4.fusions.launcher import CARRIER  # noqa: E402
from paddledsv4.fusions.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from paddledsv4.kernels import head_gradients  # noqa: E402
from paddledsv4.kernels import linear_cross_entropy as kernel  # noqa: E402

fused = linear_cross_entropy.variants["fused"].function
SHAPES = [(1, 1, 8, 5), (37, 2, 48, 300), (70, 1, 40, 393), (75, 2, 136, 393)]  # s, b, C, V; the last one's
# exponentials are in the memory of the sum that dW becomes, and then in that of dW: 128 tokens and 22
BLOCKS = (193, 2, 128, 140)  # 256, 128 and 2 tokens in bfloat16; 128, 128, 128 and 2 in float32
BOUNDS = {"float32": 2e-6, "bfloat16": 4e-3}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 1 << 14)
    monkeypatch.setattr(head_gradients, "TOKENS_BLOCK", 1 << 14)


def inputs(shape, dtype):
    s, b, width, vocabulary = shape
    rng = np.random.default_rng(vocabulary)
    labels = rng.integers(0, vocabulary, (b, s))
    labels.flat[[0, -1]] = 0, vocabulary - 1
    arrays = 3 * rng.standard_normal((s, b, width)), 0.3 * rng.standard_normal((vocabulary, width)), rng.random((b, s))
    return [paddle.to_tensor(x.astype("float32")).astype(dtype) for x in arrays] + [paddle.to_tensor(labels)]


def results(hidden, weight, dloss, labels, mask=None):
    """Losses and both gradients."""
    hidden, weight = (x.detach() for x in (hidden, weight))
    hidden.stop_gradient = weight.stop_gradient = False
    losses = fused(hidden, weight, labels, mask=mask)
    paddle.autograd.backward([losses], [dloss.astype("float32")])
    return [x.astype("float64").numpy() for x in (losses, hidden.grad, weight.grad)]


def formula(hidden, weight, dloss, labels):
    hidden, weight, dloss = (x.astype("float64").numpy() for x in (hidden, weight, dloss))
    logits = np.einsum("sbc,vc->bsv", hidden, weight)
    largest = logits.max(-1, keepdims=True)
    log = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    label = np.eye(weight.shape[0])[labels.numpy()]
    g = (np.exp(logits - log) - label) * dloss[..., None]
    losses = log[..., 0] - (logits * label).sum(-1)
    return losses, np.einsum("bsv,vc->sbc", g, weight), np.einsum("bsv,sbc->vc", g, hidden)


def errors(ours, truth):
    """One each; an array, as Python's max passes over NaN."""
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, truth, strict=True)])


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(shape, dtype):
    given = inputs(shape, dtype)
    assert errors(results(*given), formula(*given)).max() <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", [*SHAPES, BLOCKS], ids=str)
def test_with_a_known_mask_it_is_the_formula(shape, dtype):
    """Blocks of tokens; the gradient that comes is the mask times a number, and some tokens weigh nothing."""
    hidden, weight, mask, labels = inputs(shape, dtype)
    mask = mask.astype("float32")
    mask[:, 2:4] = 0.0
    given = hidden, weight, 0.3 * mask, labels
    assert errors(results(*given, mask=mask), formula(*given)).max() <= 1.5 * BOUNDS[dtype]  # rounded once more


def test_a_gradient_that_is_no_multiple_of_the_mask_is_not_taken_for_one():
    hidden, weight, dloss, labels = inputs(SHAPES[1], "float32")
    _, dx, dw = results(hidden, weight, dloss, labels, mask=paddle.ones_like(dloss))
    assert np.isnan(dx).all() and np.isnan(dw).all()


@pytest.mark.parametrize("known", [False, True])
def test_a_frozen_weight_gets_no_gradient(known):
    """Nor is it computed; that of the hidden states is the same."""
    hidden, weight, dloss, labels = inputs(SHAPES[1], "float32")
    leaf = hidden.detach()
    leaf.stop_gradient = False
    losses = fused(leaf, weight, labels, mask=dloss if known else None)
    paddle.autograd.backward([losses], [dloss])
    exact = formula(hidden, weight, dloss, labels)[1]
    assert weight.grad is None and errors([leaf.grad.numpy()], [exact]).max() <= BOUNDS["float32"]


def test_without_gradients_none_are_computed(monkeypatch):
    hidden, weight, dloss, labels = inputs(SHAPES[1], "float32")
    monkeypatch.setattr(head_gradients, "losses_and_gradients", lambda *_: pytest.fail("nobody wants them"))
    losses = fused(hidden, weight, labels, mask=dloss)
    assert errors([losses.numpy()], formula(hidden, weight, dloss, labels)[:1]).max() <= BOUNDS["float32"]


def test_tokens_without_weight_get_no_gradient():
    hidden, weight, dloss, labels = inputs(SHAPES[1], "float32")
    dloss[:, 5:9] = 0.0
    _, dx, _ = results(hidden, weight, dloss, labels)
    assert not dx[5:9].any() and dx[4].any()


def test_logits_far_from_zero():
    """Their exponentials overflow on either side. Differences of numbers near 128 carry the errors of those."""
    hidden, weight, dloss, labels = inputs(SHAPES[1], "float32")
    for shift in (-128.0, 128.0):
        hidden[:, :, 0], weight[:, 0] = 1.0, shift
        given = hidden, weight, dloss, labels
        losses, dx, dw = errors(results(*given), formula(*given))
        assert losses <= 1e-5 and dw <= 1e-4 and dx <= 1e-3


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_labels_far_below_the_largest_logit(shape):
    """Of some tokens: exponentials relative to the label's would overflow."""
    hidden, weight, mask, labels = inputs(shape, "float32")
    hidden[3:5] *= 60.0
    exact = formula(hidden, weight, mask, labels)
    assert (exact[0][:, 3:5] > 150.0).any() and (exact[0] < 40.0).any()
    losses, dx, dw = errors(results(hidden, weight, mask, labels, mask=mask), exact)
    assert losses <= 1e-5 and dw <= 1e-4 and dx <= 1e-4


def test_runs_are_alike():
    given = inputs(SHAPES[2], "bfloat16")
    for a, b in zip(results(*given), results(*given), strict=True):
        np.testing.assert_array_equal(a, b)



def logs_forgotten(carrier, dloss, x, weight, labels, logs, train):
    return kernel_backward(carrier, dloss, x, weight, labels, logs * 0)


def short_vocabulary(carrier, x, weight, labels):
    """The last tile of the vocabulary left out."""
    return kernel_forward(carrier, x, weight[: weight.shape[0] // 2].contiguous(), labels)


def ones_for_weights(carrier, dloss, x, weight, labels, logs, train):
    return kernel_backward(carrier, paddle.ones_like(dloss), x, weight, labels, logs)


kernel_forward, kernel_backward = kernel.forward, kernel.backward


@pytest.mark.parametrize("name, plant", [("forward", short_vocabulary), ("backward", logs_forgotten),
                                         ("backward", ones_for_weights)])
def test_a_planted_bug_is_found(name, plant, monkeypatch):
    monkeypatch.setattr(kernel, name, plant)
    given = inputs(SHAPES[1], "float32")
    assert not errors(results(*given), formula(*given)).max() <= 100 * BOUNDS["float32"]


def no_common_base(monkeypatch):
    launch = CARRIER.launch
    monkeypatch.setattr(CARRIER, "launch", lambda kernel, *args, **meta: (
        kernel is head_gradients._rebase or launch(kernel, *args, **meta)))


def too_near(monkeypatch):
    """dW over exponentials that are still to be read."""
    monkeypatch.setattr(head_gradients, "stretch_of", lambda *_: 32)


@pytest.mark.parametrize("plant", [no_common_base, too_near])
def test_a_planted_bug_in_the_exponentials_is_found(plant, monkeypatch):
    plant(monkeypatch)
    hidden, weight, dloss, labels = inputs(SHAPES[3], "float32")
    hidden[3:5] *= 60.0
    given = hidden, weight, dloss, labels
    assert not errors(results(*given, mask=dloss), formula(*given)).max() <= 100 * BOUNDS["float32"]


@pytest.mark.parametrize("hidden, weight, message", [
    (["float32", 6], ["float32", 6], "rows of a multiple of 16 bytes, not 6 numbers of float32"),
    (["float32", 8], ["bfloat16", 8], "of one dtype, not bfloat16, float32"),
    (["float64", 8], ["float64", 8], "takes float32 or bfloat16"),
])  # fmt: skip
def test_refusals(hidden, weight, message):
    with pytest.raises(UserError, match=message):
        fused(paddle.zeros([3, 1, hidden[1]], hidden[0]), paddle.zeros([9, weight[1]], weight[0]),
              paddle.zeros([1, 3], "int64"))  # fmt: skip
