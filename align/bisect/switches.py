"""Where two policies differ, and the policies between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import PRESETS, Policy
from paddledsv4.numerics.registry import OPS
from paddledsv4.numerics.rules import LayerRule, Overrides
from paddledsv4.numerics.ulps import measured

LAYER_RULES = "layers"  # the switch that stands for all layer rules of a policy, as in Policy.diff


@dataclass(frozen=True)
class Switches:
    """``names`` are the switches, most promising first; flipping one takes its choice from ``before`` to ``after``."""

    before: Policy
    after: Policy
    names: tuple[str, ...]

    @classmethod
    def between(cls, before: Policy, after: Policy, precision: str = "fp32") -> Switches:
        """The switches where the policies differ; ``precision`` is the run's, see :func:`promise`.

        Raises:
            UserError: they do not differ.
        """
        differing = Policy.diff(before, after)
        if not differing:
            raise UserError("--from and --to choose the same variant of every op: there is no switch to flip")
        return cls(before, after, tuple(sorted(differing, key=lambda name: promise(name, differing[name], precision))))

    def flipped(self, names: Collection[str]) -> Policy:
        """``before`` with these switches flipped to ``after``."""
        choices = {op: (self.after if op in names else self.before).choices[op] for op in self.before.choices}
        layers = (self.after if LAYER_RULES in names else self.before).layers
        return Policy.preset(self.after.name, choices, layers)

    def all_but(self, name: str) -> Policy:
        """``after`` with one switch as in ``before``."""
        return self.flipped([other for other in self.names if other != name])

    def all_but_in(self, layer: str, op: str) -> Policy:
        """``after`` with one op as in ``before`` in one layer; a numbered layer includes all that it consists of."""
        rule = LayerRule(f"{layer}.*" if layer[-1].isdigit() else layer, op, self.before.choices[op])
        return Policy.preset(self.after.name, self.after.choices, (*self.after.layers, rule))

    def choices(self, name: str) -> tuple[str, str]:
        """What the switch says in ``before`` and in ``after``."""
        return Policy.diff(self.before, self.after)[name]


def parse_policy(text: str, environment: bool = False, overrides: Overrides | None = None) -> Policy:
    """The policy in ``PRESET[,OP=VARIANT...][,GLOB:OP=VARIANT...]``, then ``overrides``.

    ``environment``: PADDLEDSV4_ variables count, as in align run; the text may then be empty.

    Raises:
        UserError: it is malformed, or names an unknown preset, op or variant.
    """
    preset, *rest = text.split(",")
    if "=" in preset or (not preset.strip() and (rest or not environment)):
        raise UserError(f"numerics {text!r}: start with a preset ({', '.join(PRESETS)}), such as torch,sinkhorn=paddle")
    said = Overrides.from_texts([r for r in rest if ":" not in r], [r for r in rest if ":" in r])
    both = said.then(overrides or Overrides())
    if environment:
        return Policy.from_env(preset.strip() or None, both)
    return Policy.preset(preset.strip(), both.ops, both.layers)


def promise(name: str, choices: tuple[str, str], precision: str) -> tuple:
    """A key that sorts likely culprits first: by their measured distance in ULPs; last, those of the same bits."""
    if name == LAYER_RULES:
        return (0, 0.0, name)
    sides = measured()["ops"].get(name, {}).values()
    distance = max((side["scaled"] for side in sides if side), default=0.0)
    return (int(precision == "fp32" and cannot_differ(name, *choices)), -distance, name)


def cannot_differ(op: str, one: str, other: str) -> bool:
    """Whether the table says that both variants give the bits of ``megatron``, in float32 on a CPU."""
    return all(name == "megatron" or OPS[op].variants[name].same_bits for name in (one, other))
