"""How many programs a persistent kernel has: one a multiprocessor, each of which goes on to its next tile."""

from __future__ import annotations

import functools

import triton
from triton.runtime.jit import JITFunction


@functools.cache
def multiprocessors() -> int:
    """Of the current device; a few in Triton's interpreter, so that its programs have several tiles too."""
    if not isinstance(_compiled, JITFunction):
        return 3
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]


@triton.jit
def _compiled():
    """An interpreted function is of another class."""
    pass
