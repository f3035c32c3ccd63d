"""Torch tensors under the kernels: for comparisons with other libraries, and for GPUs that Paddle's build lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


class TorchCarrier:
    """:class:`paddledsv4.kernels.carrier.Carrier` for torch tensors."""

    def empty(self, shape: Sequence[int], dtype: str, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device=like.device)

    def zeros(self, shape: Sequence[int], dtype: str, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*shape, dtype=getattr(torch, dtype), device=like.device)

    def rows(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x[:count]

    def strides(self, x: torch.Tensor) -> tuple[int, ...]:
        return x.stride()

    def dtype(self, x: torch.Tensor) -> str:
        return str(x.dtype).removeprefix("torch.")

    def tiles(self, x: torch.Tensor, shape: Sequence[int]) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(shape))

    def launch(self, kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        kernel[grid](*args, **meta)


CARRIER = TorchCarrier()
