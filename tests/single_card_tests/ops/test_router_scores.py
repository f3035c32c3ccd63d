"""sqrt(softplus(x)) where softplus underflows: its slope there is infinite, and infinity times zero is NaN."""

import numpy as np
import paddle
import pytest
from nan_traps import OPS, array, leaf, variants

LOGITS = [-103.0, -104.0, -104.5, -120.0, -200.0, -1e4, -3e38]


def scores(name: str, logits, dtype="float32") -> tuple[np.ndarray, np.ndarray]:
    x = leaf(paddle.to_tensor(logits, dtype))
    y = OPS["router_scores"].variants[name].function(x)
    y.sum().backward()
    return array(y), array(x.grad)


def balance_gradient(name: str) -> np.ndarray:
    """Of the sequence balance loss, which takes the affinities anew."""
    x = leaf(paddle.to_tensor([[-200.0, 1.0, -104.0, 2.0], [-1e4, 1.5, 0.5, -120.0]]))
    OPS["sequence_aux_loss"].variants[name].function(x, 1, 2, 0.1).backward()
    return array(x.grad)


def test_affinities_and_slopes_are_finite():
    y, dx = scores("paddle", LOGITS)
    np.testing.assert_allclose(y, 1e-6, 1e-6)
    assert (dx == 0).all()
    assert np.isfinite(balance_gradient("paddle")).all() and np.abs(balance_gradient("paddle")).max() > 0


def test_what_is_not_finite_stays_so():
    for logits in ([np.inf], [np.nan]):
        assert not np.isfinite(scores("paddle", logits)[0]).any()


def bare(logits, dtype="float32") -> tuple[np.ndarray, np.ndarray]:
    """By Paddle's own softplus."""
    x = leaf(paddle.to_tensor(logits, dtype))
    y = paddle.sqrt(paddle.nn.functional.softplus(x))
    y.sum().backward()
    return array(y), array(x.grad)


def exact(logits) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(logits, np.float64)
    y = np.sqrt(np.logaddexp(0, x))
    return y, 1 / (1 + np.exp(-x)) / (2 * y)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 5e-6), ("float64", 1e-13)])
def test_the_function_is_right_down_to_the_least(dtype, close):
    """Just above -5 to half of what Paddle's softplus loses there, 2^-24 e^5 in float32. From 20 on it takes x."""
    logits = np.linspace(-27, 19.9, 999).astype(dtype)
    for ours, expected in zip(scores("paddle", logits, dtype), exact(logits), strict=True):
        np.testing.assert_allclose(ours, expected, close)


def test_paddles_own_softplus_would_not_do():
    """Slopes are infinite from -17 on, and off by a thousandth at -10; ordinary logits have its bits all the same."""
    assert np.isinf(bare([-18.0])[1]).all()
    assert abs(bare([-10.0])[0][0] / exact([-10.0])[0][0] - 1) > 1e-4
    logits = np.linspace(-4.9, 30, 999)
    for ours, expected in zip(scores("paddle", logits), bare(logits), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("variant", variants("router_scores")[1:])
def test_megatrons_order_keeps_what_the_reference_does(variant):
    """The planted bug: finite at -103, NaN slopes from -104 on, which the checks above find."""
    y, dx = scores(variant.name, LOGITS)
    assert np.isfinite(y).all() and np.isfinite(dx[0])
    assert np.isnan(dx[1:]).all()
    assert np.isnan(balance_gradient(variant.name)).any()
