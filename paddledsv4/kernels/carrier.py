"""What a driver asks of the framework whose tensors it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import triton

T = Any  # a tensor of the carrier's framework: it has .shape


class Carrier(Protocol):
    """Binds kernels to the tensors of one framework. dtypes are names, such as "bfloat16"."""

    def empty(self, shape: Sequence[int], dtype: str, like: T) -> T:
        """Memory for a contiguous tensor on the device of ``like``, whatever it holds."""

    def zeros(self, shape: Sequence[int], dtype: str, like: T) -> T:
        """The same, filled with zeros."""

    def rows(self, x: T, count: int) -> T:
        """The first rows of ``x`` as they are now: the same memory or a copy."""

    def strides(self, x: T) -> tuple[int, ...]:
        """Elements from one index to the next, a number per dimension."""

    def dtype(self, x: T) -> str:
        """The name of the dtype of ``x``."""

    def tiles(self, x: T, shape: Sequence[int]) -> Any:
        """A kernel's argument through which it loads and stores tiles of ``shape`` of ``x`` (a tensor descriptor: on
        a GPU by its copy engine). Beyond the edges tiles read as zeros and are not stored. The last dimension of ``x``
        has unit stride, and the others' strides are multiples of 16 bytes."""

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Run ``kernel`` on ``grid``. Tensors among ``args`` become pointers; ``meta``: its constexpr arguments and
        Triton's options, such as num_warps."""
