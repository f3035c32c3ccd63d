"""Memory that a kernel has to write: NaN in what ``empty`` gives, so that what stays unwritten shows."""

from __future__ import annotations

import paddle
import pytest

from paddledsv4.fusions.launcher import CARRIER


def poison(monkeypatch, integer: int | None = None) -> None:
    """Every ``empty`` of the carrier is full of NaN; of integers, full of ``integer`` or else their smallest number."""

    def empty(shape, dtype, like):
        value = float("nan") if "float" in dtype else paddle.iinfo(dtype).min if integer is None else integer
        return paddle.full(list(shape), value, dtype)

    monkeypatch.setattr(CARRIER, "empty", empty)


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.fixture
def poisoned_nearby(monkeypatch):
    """Integers are indices that do not exist, but near enough that a planted bug reads them without a crash."""
    poison(monkeypatch, -(1 << 14))
