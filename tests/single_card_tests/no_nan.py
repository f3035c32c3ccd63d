"""numpy's assertions, strict: a NaN equals nothing. By default two NaN at one place pass for equal numbers.

Imported for its effect, by conftest.py and by what the ranks of multi-card tests run.
"""

from __future__ import annotations

import functools

import numpy as np


def _strict(check):
    @functools.wraps(check)
    def strict(actual, desired, *args, **kwargs):
        check(actual, desired, *args, **kwargs)
        for x in map(np.asarray, (actual, desired)):
            if x.dtype.kind in "fc" and np.isnan(x).any():
                raise AssertionError(f"{int(np.isnan(x).sum())} of {x.size} numbers are NaN")

    strict.refuses_nan = True
    return strict


for name in ("assert_array_equal", "assert_allclose", "assert_equal", "assert_array_almost_equal"):
    if not hasattr(getattr(np.testing, name), "refuses_nan"):
        setattr(np.testing, name, _strict(getattr(np.testing, name)))
