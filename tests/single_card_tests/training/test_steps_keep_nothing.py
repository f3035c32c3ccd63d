"""A step leaves no memory behind: what malloc has handed out is the same after every step."""

import ctypes

import pytest
from checkpoints import small

from paddledsv4.training.optimizer import Optimizer

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def in_use() -> float:
    """KiB."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    libc.mallinfo2.restype = Mallinfo
    return libc.mallinfo2().uordblks / 1024


def kept_by_a_step(preset: str) -> float:
    """KiB, the mean over steps 6 to 15."""
    seen = [in_use() for result in small(preset, steps=15).train(15) if result.step >= 5]
    return (seen[-1] - seen[0]) / (len(seen) - 1)


def test_a_step_keeps_nothing():
    assert abs(kept_by_a_step("paddle")) < 8


def test_gradients_added_with_autograd_are_seen(monkeypatch):
    """As it was: every microbatch left a node, 280 KiB a step of this model."""
    monkeypatch.setattr(Optimizer, "accumulate", Optimizer.accumulate.__wrapped__)
    assert kept_by_a_step("paddle") > 50
