"""A fused variant against the definition of its op in float64, and bugs planted in what its kernels are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.numerics.registry import load_all
from paddledsv4.ops.precision import dtype_name

BOUNDS = {"float32": 2e-6, "bfloat16": 4e-3}  # norm of the difference over the norm of the truth, by the result's dtype
ONE_NUMBER = 10  # times the bound, where a result is one number: a sum that may cancel


def fused(op: str) -> Callable:
    return load_all()[op].variants["fused"].function


def normal(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    return (scale * paddle.randn(list(shape))).astype(dtype)


def _tuple(x) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def run(function: Callable, tensors: Sequence, static: dict, seeds: Sequence[Tensor] | None = None):
    """Floating outputs, then gradients of the floating tensors; and the seeds, drawn if there are none."""
    held = [x.detach() if isinstance(x, Tensor) else x for x in tensors]
    leaves = [x for x in held if isinstance(x, Tensor) and x.is_floating_point()]
    for x in leaves:
        x.stop_gradient = False
    outputs = [y for y in _tuple(function(*held, **static)) if y.is_floating_point()]
    seeds = seeds or [normal(*y.shape, dtype=dtype_name(y)) for y in outputs]
    paddle.autograd.backward(outputs, [g.astype(y.dtype) for g, y in zip(seeds, outputs, strict=True)])
    return outputs + [x.grad for x in leaves if x.grad is not None], seeds


def relative_errors(op: str, definition: str, tensors: Sequence, static: dict, exact: dict | None = None):
    """(error, bound) of every output and gradient of the fused variant; NaN where one is. ``exact``: arguments of the
    definition that differ."""
    wide = [x.astype("float64") if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]
    ours, seeds = run(fused(op), tensors, static)
    truth, _ = run(load_all()[op].variants[definition].function, wide, static | (exact or {}), seeds)
    assert len(ours) == len(truth) and all(a.shape == b.shape for a, b in zip(ours, truth, strict=True))
    found = []
    for got, expected in zip(ours, truth, strict=True):
        expected, bound = expected.numpy(), BOUNDS[dtype_name(got)] * (ONE_NUMBER if got.size == 1 else 1)
        distance, size = np.linalg.norm(got.astype("float64").numpy() - expected), np.linalg.norm(expected)
        found.append((distance / size if size else distance, bound))
    return found


def is_the_definition(*args, **kwargs) -> bool:
    """Whether every error is within its bound; NaN is not."""
    return all(error <= bound for error, bound in relative_errors(*args, **kwargs))


def same_bits(op: str, tensors: Sequence, static: dict) -> bool:
    """Whether two runs agree to the last bit."""
    first, seeds = run(fused(op), tensors, static)
    second, _ = run(fused(op), tensors, static, seeds)
    return all(np.array_equal(a.astype("float32").numpy(), b.astype("float32").numpy())
               for a, b in zip(first, second, strict=True))


def plant(monkeypatch, kernel: str, argument: str, change: Callable) -> None:
    """From now on the kernel gets ``change`` of what it should get for ``argument``."""
    launch = CARRIER.launch

    def tampered(function, grid, *args, **meta):
        if function.__name__ == kernel:
            names = function.arg_names
            args = tuple(change(a) if name == argument else a for name, a in zip(names, args, strict=False))
            meta = {name: change(a) if name == argument else a for name, a in meta.items()}
            assert argument in names
        launch(function, grid, *args, **meta)

    monkeypatch.setattr(CARRIER, "launch", tampered)
