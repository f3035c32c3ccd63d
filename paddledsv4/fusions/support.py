"""Where the fused kernels run: on a Hopper GPU or newer, or, for tests, in Triton's interpreter."""

from __future__ import annotations

import os

import paddle

CAPABILITY = (9, 0)


def refusal() -> str:
    """Why Triton kernels cannot run here, "" if they can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if paddle.get_device().startswith("cpu"):
        return "no GPU (TRITON_INTERPRET=1 interprets kernels on a CPU, for tests)"
    found = paddle.device.cuda.get_device_capability()
    return "" if found >= CAPABILITY else f"compute capability {found[0]}.{found[1]}, kernels are for 9.0 and newer"
