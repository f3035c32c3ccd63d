"""What kernels run on."""

from __future__ import annotations

import functools

import triton
from triton.runtime.jit import JITFunction


@triton.jit
def _nothing():
    pass


def compiled() -> bool:
    """Whether kernels are compiled for a GPU; False in Triton's interpreter."""
    return isinstance(_nothing, JITFunction)


@functools.cache
def multiprocessors() -> int:
    """Of the current device: as many programs has a persistent kernel. A few in the interpreter, so that each has
    several tiles there too."""
    if not compiled():
        return 3
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]
