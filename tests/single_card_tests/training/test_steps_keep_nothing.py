"""A step leaves no memory behind: what malloc has handed out is the same after every step."""

import ctypes
import gc
from dataclasses import replace

import pytest
from checkpoints import small

from paddledsv4.numerics.registry import load_all
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
    gc.collect()
    return libc.mallinfo2().uordblks / 1024


def kept_by_a_step(preset: str) -> float:
    """KiB, the mean over steps 6 to 15."""
    seen = [in_use() for result in small(preset, steps=15).train(15) if result.step >= 5]
    return (seen[-1] - seen[0]) / (len(seen) - 1)


def torch_tensors_after(steps: int) -> list[int]:
    """How many tensors torch has after each step."""
    return [alive() for _ in small("torch", steps=steps).train(steps)]


def alive() -> int:
    gc.collect()
    return sum(type(x).__module__ == "torch" and type(x).__name__ == "Tensor" for x in gc.get_objects())


def test_a_step_keeps_nothing():
    assert abs(kept_by_a_step("paddle")) < 2


def test_gradients_added_with_autograd_are_seen(monkeypatch):
    """As it was: every microbatch left a node, 280 KiB a step of this model."""
    monkeypatch.setattr(Optimizer, "accumulate", Optimizer.accumulate.__wrapped__)
    assert kept_by_a_step("paddle") > 50


def test_a_step_on_torchs_kernels_keeps_no_tensor():
    pytest.importorskip("torch")
    assert len(set(torch_tensors_after(4)[1:])) == 1


def test_memory_of_torch_that_paddle_is_given_twice_is_seen(monkeypatch):
    """As it was: one table of torch's for all layers, lent to Paddle once for each of them."""
    pytest.importorskip("torch")
    from paddledsv4.numerics.torch_kernels import to_paddle, to_torch

    variants, tables = load_all()["rope_table"].variants, {}

    def lent_again(*args):
        if args not in tables:
            tables[args] = [to_torch(x).clone() for x in variants["megatron"].function(*args)]
        return tuple(to_paddle(t.detach()) for t in tables[args])

    monkeypatch.setitem(variants, "torch", replace(variants["torch"], function=lent_again))
    _, second, third, fourth = torch_tensors_after(4)
    assert second < third < fourth
