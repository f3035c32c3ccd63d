"""Run one recorded call of an op under several variants: what is not finite, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from align.ulps import Distance
from paddledsv4.errors import UserError
from paddledsv4.model import DTYPES
from paddledsv4.numerics.bfloat16 import needs_emulation
from paddledsv4.numerics.policy import Policy, check_usable
from paddledsv4.numerics.registry import Op
from paddledsv4.observe.finite import described, is_finite, kind
from paddledsv4.observe.known import known_ops
from paddledsv4.observe.ops import OpCall
from paddledsv4.observe.replay import replay
from paddledsv4.observe.reproduction import Reproduction
from paddledsv4.observe.suspect import arguments, result_name


@dataclass(frozen=True)
class Given:
    """What one variant gave for one result, or for the gradient of one input.

    ``wrong`` says what is not finite, "" if everything is; ``distance`` is from the first variant's, None for itself.
    """

    variant: str
    name: str
    kind: str
    wrong: str
    distance: Distance | None


def chosen_variants(op: Op, origin_variant: str, preset: str | None, variants: Sequence[str]) -> list[str]:
    """The variants to run, the recorded one first: those named, that of a preset, or else all that run here.

    Raises:
        UserError: a preset or a variant that there is not, or whose package is missing.
    """
    wanted = list(variants)
    if preset:
        choice = Policy.preset(preset).choices.get(op.name, preset)  # a fused op is no switch
        wanted.append(choice if choice in op.variants else "paddle")
    for name in wanted:
        check_usable(op, name)
    usable = [v.name for v in op.variants.values() if not v.missing()]
    ordered = dict.fromkeys([*([origin_variant] if origin_variant in usable else []), *(wanted or usable)])
    return list(ordered)


def rerun(recorded: Reproduction, preset: str | None = None, variants: Sequence[str] = ()) -> list[Given]:
    """Every result of every chosen variant; the first variant is what the others are measured against.

    Raises:
        UserError: the op is in no table, exchanged tensors with other ranks, or refuses these arguments.
    """
    origin, ops = recorded.origin, known_ops()
    if origin.op not in ops:
        raise UserError(f"op {origin.op} is no op of this paddledsv4")
    if origin.ranks > 1:
        raise UserError(
            f"{origin.op} exchanged tensors with {origin.ranks - 1} other ranks, so it cannot run alone; the file has "
            "its inputs"
        )
    op, emulate = ops[origin.op], needs_emulation(DTYPES[origin.precision])
    first, found = None, []
    for name in chosen_variants(op, origin.variant, preset, variants):
        variant = op.variants[name]
        try:
            values = named_results(recorded, (emulate and variant.emulated) or variant.function)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"variant {name} of {op.name} refuses these arguments: {said}") from None
        first = values if first is None else first
        for (label, value), (_, reference) in zip(values, first, strict=True):
            distance = None
            if values is not first:
                distance = Distance()
                distance.add(value, reference)
            wrong = "" if value is None or is_finite(value) else described(value)
            found.append(Given(name, label, kind(value), wrong, distance))
    return found


def named_results(recorded: Reproduction, function: Any) -> list[tuple[str, Any]]:
    """(name, value) of every result, then of the gradient of every input that wants one."""
    call = recorded.call
    outputs, gradients = replay(call, function)
    given = OpCall(call.op, call.path, function, tuple(call.args), call.kwargs)
    wanting = [name for name, x in arguments(given) if hasattr(x, "stop_gradient") and not x.stop_gradient]
    named = [(result_name(call.op, i), x) for i, x in enumerate(outputs)]
    return named + [(f"gradient of {name}", x) for name, x in zip(wanting, gradients, strict=False)]


def as_dict(recorded: Reproduction, found: list[Given]) -> dict[str, Any]:
    """For programs."""
    rows = [
        {"variant": g.variant, "name": g.name, "kind": g.kind, "not_finite": g.wrong or None,
         "distance": g.distance and _plain(g.distance.to_dict())}
        for g in found
    ]  # fmt: skip
    origin = recorded.origin
    where = {name: getattr(origin, name) for name in ("op", "path", "step", "microbatch", "rank", "variant", "found")}
    return {**where, "results": rows}


def _plain(figures: dict[str, float] | None) -> dict[str, float | str] | None:
    """JSON has no infinity."""
    return figures and {name: x if math.isfinite(x) else str(x) for name, x in figures.items()}


def as_table(found: list[Given]) -> Table:
    """For a terminal."""
    table = Table("variant", "result", "kind", "not finite", title=f"Differences are from {found[0].variant}")
    for heading in ("equal", "max ULP", "max difference"):
        table.add_column(heading, justify="right")
    previous = None
    for g in found:
        if previous not in (None, g.variant):
            table.add_section()
        table.add_row("" if g.variant == previous else g.variant, g.name, g.kind, g.wrong or "-", *_figures(g.distance))
        previous = g.variant
    return table


def _figures(distance: Distance | None) -> tuple[str, str, str]:
    if distance is None or not distance.elements:
        return "", "", ""
    return f"{distance.equal / distance.elements:.2%}", f"{distance.max:.3g}", f"{distance.largest:.3g}"
