"""A tensor times a number on the device: the bits of a float32 product rounded once."""

import numpy as np
import paddle
import pytest

pytest.importorskip("triton")

from poison import poisoned  # noqa: E402, F401

from paddledsv4.fusions.launcher import CARRIER  # noqa: E402
from paddledsv4.kernels.scale import times  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (70, 129)])
def test_it_is_rounded_once(shape, dtype):
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype("float32")).astype(dtype)
    assert np.isnan(times(CARRIER, x, paddle.to_tensor(float("nan"))).astype("float32").numpy()).all()
    for number in (0.3, -7.0, 0.0):
        factor = paddle.to_tensor(number, "float32")
        expected = (x.astype("float32") * factor).astype(dtype)
        found = times(CARRIER, x, factor)
        assert found.dtype == x.dtype and found.shape == x.shape
        np.testing.assert_array_equal(found.astype("float32").numpy(), expected.astype("float32").numpy())


def test_a_part_of_another_tensor():
    """As the head's gradient is: the first rows of more memory, which stays as it was."""
    whole = paddle.arange(12, dtype="float32").reshape([4, 3])
    found = times(CARRIER, CARRIER.rows(whole, 2), paddle.to_tensor(2.0))
    np.testing.assert_array_equal(found.numpy(), 2 * np.arange(6, dtype="float32").reshape(2, 3))
    np.testing.assert_array_equal(whole.numpy().reshape(-1), np.arange(12))
