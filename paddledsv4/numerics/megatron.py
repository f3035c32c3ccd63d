"""Megatron's order of operations, written once and run on two sets of kernels.

A function decorated with :func:`megatron_order` takes the kernels as its first argument, ``K``, and uses nothing
else but arithmetic, slices and reshapes, which Paddle's and torch's tensors share. It becomes two variants of its op:

* ``megatron``: K = :class:`~paddledsv4.numerics.paddle_kernels.PaddleKernels`, no torch needed;
* ``torch``: K = :class:`~paddledsv4.numerics.torch_kernels.TorchKernels`, zero-copy on the same memory.

The backward is the autograd of whichever framework runs the kernels, inside the op only. Where Megatron has a
hand-written autograd function the order is explicit too: ``explicit=True``, and the function returns its outputs and
a ``backward`` closure, as for :func:`~paddledsv4.numerics.function.differentiable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from paddledsv4.numerics.bfloat16 import with_rounding
from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.paddle_kernels import PaddleKernels
from paddledsv4.numerics.registry import Op


def megatron_order(
    op: Op, note: str, explicit: bool = False, same_bits: str = "", constant: bool = False
) -> Callable[[Callable], Callable]:
    """Register the decorated ``function(K, *tensors, **static)`` as variants ``megatron`` and ``torch`` of ``op``.

    ``same_bits`` says why the two give the same bits in float32 on a CPU, where they do. ``constant``: the function
    takes no tensors, and its last results are kept. They are kept as Paddle tensors, because Paddle never frees memory
    of torch's that it was given a second time while it had it.
    """
    kept = functools.lru_cache(maxsize=64) if constant else lambda variant: variant

    def register(function: Callable) -> Callable:
        native = functools.partial(function, PaddleKernels)
        functools.update_wrapper(native, function)
        native = kept(differentiable(native) if explicit else native)
        emulated, on_torch = kept(with_rounding(function, explicit)), kept(_on_torch(function, explicit))
        op.variant("megatron", note, emulated=emulated)(native)
        op.variant(
            "torch", "as megatron, on torch's kernels", needs="torch", same_bits=same_bits, emulated=on_torch
        )(on_torch)
        return function

    return register


def _on_torch(function: Callable, explicit: bool) -> Callable:
    """The function on torch's kernels; torch is imported when it is first called."""

    @functools.cache
    def bridged() -> Callable:
        from paddledsv4.numerics import torch_kernels

        return torch_kernels.bridge(function, explicit)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return bridged()(*args, **kwargs)

    return call
