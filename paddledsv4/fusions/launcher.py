"""Paddle's tensors as Triton's arguments: the carrier of the fused variants.

Triton asks a tensor for its address and its dtype and, in its interpreter, for its storage. :class:`Pointer` answers
these for a Paddle tensor, so kernels run on the tensor's own memory, on a GPU and in the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor

from paddledsv4.ops.precision import dtype_name


class TypeName(str):
    """The name of a dtype, which is how Triton finds its own, and the size that its descriptors ask for."""

    itemsize = property(lambda self: paddle.core.size_of_dtype(getattr(paddle, self)))


class Pointer:
    """A Paddle tensor as Triton sees it. In the interpreter it is its own storage, which is in the host's memory."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor, self.dtype = tensor, TypeName(dtype_name(tensor))

    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    def untyped_storage(self) -> Pointer:
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__) -> Pointer:
        return Pointer(self.tensor)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> list[int]:
        return self.tensor.shape

    def stride(self) -> list[int]:
        return self.tensor.strides

    def set_(self, *_) -> None:
        """Nothing to set: the memory is shared."""

    copy_ = set_


class PaddleCarrier:
    """:class:`paddledsv4.kernels.carrier.Carrier` for Paddle tensors."""

    def empty(self, shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
        return paddle.empty(list(shape), dtype)

    def zeros(self, shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
        return paddle.zeros(list(shape), dtype)

    def rows(self, x: Tensor, count: int) -> Tensor:
        return x[:count]

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.strides)

    def dtype(self, x: Tensor) -> str:
        return dtype_name(x)

    def tiles(self, x: Tensor, shape: Sequence[int]) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(Pointer(x), list(x.shape), list(x.strides), list(shape))

    def launch(self, kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        enable_triton()
        kernel[grid](*(Pointer(a) if isinstance(a, Tensor) else a for a in args), **meta)


@functools.cache
def enable_triton() -> None:
    """Lets Triton find Paddle's device and stream where it looks for torch's; on a CPU, its interpreter."""
    if paddle.get_device().startswith("cpu"):
        from paddledsv4.kernels.interpreter import mend

        mend()
    else:
        paddle.enable_compat(scope={"triton"})


CARRIER = PaddleCarrier()
