"""Where the fused kernels run, on a Hopper GPU or newer or, for tests, in Triton's interpreter; and on what."""

from __future__ import annotations

import os

import paddle
from paddle import Tensor

from paddledsv4.errors import UserError
from paddledsv4.ops.precision import dtype_name

DTYPES = ("float32", "bfloat16")
CAPABILITY = (9, 0)


def refusal() -> str:
    """Why Triton kernels cannot run here, "" if they can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if paddle.get_device().startswith("cpu"):
        return "no GPU (TRITON_INTERPRET=1 interprets kernels on a CPU, for tests)"
    found = paddle.device.cuda.get_device_capability()
    return "" if found >= CAPABILITY else f"compute capability {found[0]}.{found[1]}, kernels are for 9.0 and newer"


def refuse(op: str, limit: str) -> None:
    """Raises UserError unless ``limit``, what the fused variant of ``op`` does not take, is empty."""
    if limit:
        raise UserError(f"{op}=fused: {limit}; choose {op}=paddle")


def check_rows(what: str, *tensors: Tensor) -> None:
    """Whether a kernel can load tiles of these tensors through descriptors.

    Raises:
        UserError: dtypes that differ or are neither float32 nor bfloat16, or rows that have no multiple of 16 bytes.
    """
    dtypes = {dtype_name(x) for x in tensors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise UserError(f"{what} takes float32 or bfloat16 tensors of one dtype, not {', '.join(sorted(dtypes))}; "
                        "choose another variant")  # fmt: skip
    for x in tensors:
        check_width(what, x.shape[-1], x)


def check_width(what: str, width: int, like: Tensor) -> None:
    """Raises UserError: rows of ``width`` numbers of the dtype of ``like`` have no multiple of 16 bytes."""
    if width * like.element_size() % 16:
        raise UserError(f"{what} takes rows of a multiple of 16 bytes, not {width} numbers of {dtype_name(like)}; "
                        "choose another variant or another size")  # fmt: skip


def flat(x: Tensor, *inner: int) -> Tensor:
    """x as contiguous [rows, *inner], which kernels index by themselves."""
    return x.reshape([-1, *inner]).contiguous()


def check(op: str, *tensors: Tensor, **limits: tuple[int, bool, str]) -> None:
    """Raises UserError where the fused variant of ``op`` is not made for these tensors.

    ``limits``: name of a size -> the size, whether it is supported, and what is.
    """
    for x in tensors:
        if dtype_name(x) not in DTYPES:
            raise UserError(f"{op}: fused kernels take {' and '.join(DTYPES)}, not {dtype_name(x)}; choose {op}=paddle")
    for name, (size, supported, what) in limits.items():
        if not supported:
            raise UserError(f"{op}: the fused kernel needs {name} {what}, not {size}; choose {op}=paddle")


def power_of_two(size: int, most: int) -> tuple[int, bool, str]:
    """A limit for :func:`check`."""
    return size, size & (size - 1) == 0 and 0 < size <= most, f"to be a power of two up to {most}"
