"""The reference of a step, op by op: every call with its arguments, results and gradients, and the noise around them.

Recorded from a preset that is proven equal to the bundle (`torch`), or, without torch, from the nearest one. The
noise of a result is how far other legal computations of the same call are from it: the op's other variants, the
candidate's own left out because it may be the faulty one, the formula in float64, and the same with every input moved
by at most its rounding error, which shows what an ill-conditioned result makes of any rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from align.calls import CallRecorder
from align.locate.distance import Error, Noise, numbers
from paddledsv4.model import DTYPES
from paddledsv4.numerics.bfloat16 import needs_emulation
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.observe.replay import Call, replay
from paddledsv4.training.trainer import Trainer

# No measure of rounding: `hf` computes another formula on purpose, and `fused` kernels, which a CPU interprets for
# minutes, break ties of their own.
NO_MEASURE = {"hf", "fused"}
DRAWS = 8  # disturbances of a call with a single number among its results, which one draw may leave alone by chance
DTYPE_NAMES = {"float32", "bfloat16", "float64"}


@dataclass
class Recorded:
    """One call of the reference.

    Attributes:
        exact: the candidate uses the reference's own variant here, so every bit must agree.
        results: outputs, or for an op that works in place the arguments it changed.
        gradients: of every tensor argument that wants one; None where none flows.
    """

    step: int
    call: Call
    exact: bool
    results: list[Any]
    gradients: list[Tensor | None]
    result_noise: list[Noise] = field(default_factory=list)
    gradient_noise: list[Noise] = field(default_factory=list)


def record(
    make: Callable[[Policy], Trainer], reference: Policy, candidate: Policy, steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Recorded]:
    """The calls of ``steps`` steps in the order in which the model makes them; ``progress(done, total)`` in calls."""
    trainer = make(reference)
    emulate = needs_emulation(DTYPES[trainer.precision])
    run, found = trainer.train(steps), []
    for step in range(1, steps + 1):
        with CallRecorder(trainer.model) as recorder:
            next(run)
        for call in recorder.calls:
            found.append(_recorded(step, call, reference, candidate, emulate))
            progress(len(found), steps * len(recorder.calls))
    _share_noise(found)
    return found


def _share_noise(found: list[Recorded]) -> None:
    """No call's noise is below the median of its op's; that of a single number, of which a few computations may agree
    by chance, not below the largest."""
    pools = defaultdict(list)
    for recorded in found:
        for kind in ("result", "gradient"):
            values, noises = getattr(recorded, f"{kind}s"), getattr(recorded, f"{kind}_noise")
            for i, (value, noise) in enumerate(zip(values, noises, strict=True)):
                pools[recorded.call.op, kind, i, numbers(value).size == 1].append(noise)
    for (*_, single), pool in pools.items():
        shared = max if single else median
        floor = [shared(getattr(noise, name) for noise in pool) for name in ("rms", "peak", "scale")]
        for noise in pool:
            noise.rms, noise.peak, noise.scale = map(max, (noise.rms, noise.peak, noise.scale), floor)


def _recorded(step: int, call: Call, reference: Policy, candidate: Policy, emulate: bool) -> Recorded:
    variants = load_all()[call.op].variants
    mine, theirs = (policy.at(call.path)[call.op] for policy in (reference, candidate))

    def run(variant: str, of: Call = call):
        chosen = variants[variant]
        return replay(of, (emulate and chosen.emulated) or chosen.function)

    results, gradients = run(mine)
    noises = [Noise() for _ in results], [Noise() for _ in gradients]
    found = Recorded(step, call, mine == theirs, results, gradients, *noises)
    if found.exact:
        return found
    others = [v for v in variants if v not in NO_MEASURE | {mine, theirs} and not variants[v].missing()]
    for variant in others:
        _widen(found, run(variant))
    exact = "megatron" if "megatron" in variants and theirs != "megatron" else next(iter(others), mine)
    wide = in_float64(call)
    _widen(found, replay(wide, variants[exact].function))
    single = any(numbers(x).size == 1 for x in [*results, *gradients] if x is not None)
    for seed in range(DRAWS if single else 1):
        _widen(found, replay(disturbed(wide, seed), variants[exact].function))
    return found


def _widen(found: Recorded, other: tuple[list, list]) -> None:
    for noises, ours, theirs in (
        (found.result_noise, other[0], found.results), (found.gradient_noise, other[1], found.gradients)
    ):
        for noise, a, b in zip(noises, ours, theirs, strict=False):
            noise.add(Error.of(a, b))


def _mapped(function: Callable, call: Call) -> Call:
    """The call with ``function`` of every argument and gradient."""

    def apply(x):
        if isinstance(x, list | tuple):
            return type(x)(map(apply, x))
        result = function(x)
        if isinstance(x, Tensor):
            result.stop_gradient = x.stop_gradient
        return result

    return replace(
        call, args=apply(call.args), kwargs={k: apply(v) for k, v in call.kwargs.items()},
        gradients={i: apply(g) for i, g in call.gradients.items()},
    )


def in_float64(call: Call) -> Call:
    """The same call with floating-point tensors, and dtypes asked for by name, in float64."""

    def widen(x):
        if isinstance(x, str):
            return "float64" if x in DTYPE_NAMES else x
        return x.detach().astype("float64") if isinstance(x, Tensor) and x.is_floating_point() else x

    return _mapped(widen, call)


def disturbed(wide: Call, seed: int = 0) -> Call:
    """``wide`` with every number off by a random part of float32's rounding error: what arithmetic inside an op does to
    it. Also for bfloat16, whose tensors the op gets as they are; its roundings inside are what the variants differ in.
    """
    random = np.random.default_rng(seed)

    def move(x):
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        return x.detach() * paddle.to_tensor(1 + 2.0**-24 * random.uniform(-1, 1, x.shape))

    return _mapped(move, wide)


def names_of(model: paddle.nn.Layer) -> dict[int, str]:
    """id -> name of every parameter and buffer, to say which one an argument is."""
    return {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
