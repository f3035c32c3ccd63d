"""Golden cases of the traps that turned long runs into NaN, made by running other implementations."""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest
from reference import ROOT
from safetensors.paddle import load_file

from paddledsv4.numerics.registry import Variant, load_all
from paddledsv4.ops.precision import widen

OPS = load_all()


@functools.cache
def golden() -> dict[str, paddle.Tensor]:
    return load_file(ROOT / "tests" / "data" / "nan_trap_cases.safetensors")


def variants(op: str) -> list:
    """The variants of an op as test parameters, skipped where what they need is missing. Kernels are interpreted, which
    is slow; their own tests are in kernels/."""

    def marks(variant: Variant) -> list:
        skip = pytest.mark.skipif(bool(variant.missing()), reason=variant.missing() or "runs here")
        return [skip, pytest.mark.slow] if variant.needs == "triton" else [skip]

    return [pytest.param(v, id=v.name, marks=marks(v)) for v in OPS[op].variants.values()]


def function(variant: Variant, dtype: str):
    """What a model of this precision calls on a CPU."""
    if variant.name == "fused" and dtype == "float64":
        pytest.skip("kernels take float32 and bfloat16")
    return variant.emulated if dtype == "bfloat16" else variant.function


def leaf(x: paddle.Tensor, dtype=None) -> paddle.Tensor:
    """A copy that gradients are kept of."""
    x = x.detach().astype(dtype or x.dtype).clone()
    x.stop_gradient = False
    return x


def array(x: paddle.Tensor) -> np.ndarray:
    return widen(x.detach()).numpy()


def assert_finite(**tensors: np.ndarray) -> None:
    bad = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    assert not bad, f"not finite: {', '.join(bad)}"
