"""All ops that a model may call: those of the table of switches, and the fused ones beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from paddledsv4.fusions.linear_cross_entropy import linear_cross_entropy
from paddledsv4.numerics.registry import Op, load_all


@functools.cache
def known_ops() -> Mapping[str, Op]:
    """name -> op."""
    return load_all() | {linear_cross_entropy.name: linear_cross_entropy}


def variant_name(op: str, function: Callable) -> str:
    """The name under which a function stands among the variants of an op; "" if it does not."""
    variants = known_ops()[op].variants.values() if op in known_ops() else ()
    return next((v.name for v in variants if function in (v.function, v.emulated)), "")
