"""NaN passes in no comparison of these tests."""

import numpy as np
import pytest

NAN = np.array([1.0, np.nan], np.float32)


@pytest.mark.parametrize("check", [np.testing.assert_array_equal, np.testing.assert_allclose, np.testing.assert_equal])
def test_two_nan_are_not_equal(check):
    check(np.ones(2), np.ones(2))
    check(["a"], ["a"]) if check is not np.testing.assert_allclose else None
    for actual, desired in ((NAN, NAN), (NAN, np.ones(2)), (np.ones(2), NAN)):
        with pytest.raises(AssertionError):
            check(actual, desired)


def test_approx_refuses_nan_too():
    assert float("nan") != pytest.approx(float("nan"))
