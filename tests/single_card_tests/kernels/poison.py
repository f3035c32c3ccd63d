"""Memory that a kernel has to write: NaN in what ``empty`` gives, so that what stays unwritten shows."""

from __future__ import annotations

import paddle
import pytest

from paddledsv4.fusions.launcher import CARRIER


@pytest.fixture
def poisoned(monkeypatch):
    """Every ``empty`` of the carrier is full of NaN; of integers, full of their smallest number."""

    def empty(shape, dtype, like):
        value = float("nan") if "float" in dtype else paddle.iinfo(dtype).min
        return paddle.full(list(shape), value, dtype)

    monkeypatch.setattr(CARRIER, "empty", empty)
