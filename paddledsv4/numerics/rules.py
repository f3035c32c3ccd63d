"""What deviates from a preset: rules for single ops, and rules for the ops of some layers.

As text, which is what the command line and the environment hold::

    swiglu=paddle                        every swiglu
    decoder.layers.2.*:swiglu=paddle     the swiglu of every layer whose path the glob matches

As yaml::

    numerics: {preset: torch, sinkhorn: paddle, layers: {"decoder.layers.2.*": {swiglu: paddle}}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from paddledsv4.errors import UserError

OP_FORM = "OP=VARIANT, such as swiglu=paddle"
LAYER_FORM = "GLOB:OP=VARIANT, such as decoder.layers.2.*:swiglu=paddle"


@dataclass(frozen=True)
class LayerRule:
    """``op`` is ``variant`` in every layer whose path, under Megatron's names, ``glob`` matches.

    ``*`` also runs over dots; a trailing ``.*`` includes the layer itself: ``decoder.layers.2.mlp.*`` means the
    mixture of experts and all that it consists of.
    """

    glob: str
    op: str
    variant: str

    def matches(self, path: str) -> bool:
        """Whether the layer at ``path`` is meant."""
        return glob_matches(self.glob, path)

    def __str__(self) -> str:
        return f"{self.glob}:{self.op}={self.variant}"


@dataclass(frozen=True)
class Overrides:
    """op -> variant everywhere, and rules for layers, which win over it; a later rule wins over an earlier one."""

    ops: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[LayerRule, ...] = ()

    def then(self, later: Overrides) -> Overrides:
        """Both; what ``later`` says wins."""
        return Overrides({**self.ops, **later.ops}, self.layers + later.layers)

    @classmethod
    def from_texts(cls, ops: Iterable[str] | None = (), layers: Iterable[str] | None = ()) -> Overrides:
        """From the values of ``--op`` and ``--layer-op``; one value may hold several rules, separated by commas.

        Raises:
            UserError: a text of another form.
        """
        pairs = [_op_rule(part, "--op", OP_FORM) for text in ops or () for part in _parts(text, "--op", OP_FORM)]
        rules = [rule for text in layers or () for rule in layer_rules(text, "--layer-op")]
        return cls(dict(pairs), tuple(rules))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Overrides:
        """From a recipe's ``numerics`` mapping without its ``preset``.

        Raises:
            UserError: something other than names where names belong.
        """
        ops, layers = dict(values), values.get("layers", {})
        ops.pop("layers", None)
        for op, variant in ops.items():
            if not isinstance(variant, str):
                raise UserError(f"numerics.{op} = {variant!r}: must be the name of a variant")
        if not isinstance(layers, dict):
            raise UserError(f"numerics.layers = {layers!r}: must map a glob to a mapping of op to variant")
        rules = []
        for glob, choices in layers.items():
            texts = isinstance(choices, dict) and all(isinstance(x, str) for pair in choices.items() for x in pair)
            if not (isinstance(glob, str) and texts):
                raise UserError(f"numerics.layers.{glob} = {choices!r}: must be a mapping of op to variant")
            rules += [LayerRule(glob, op, variant) for op, variant in choices.items()]
        return cls(ops, tuple(rules))


def glob_matches(glob: str, path: str) -> bool:
    """Whether a glob over layers means the one at ``path``, see :class:`LayerRule`. The model itself, "", never is."""
    return bool(path) and (fnmatchcase(path, glob) or (glob.endswith(".*") and fnmatchcase(path, glob[:-2])))


def layer_rules(text: str, source: str) -> list[LayerRule]:
    """The rules in "GLOB:OP=VARIANT,..."; ``source`` says in messages where the text stands.

    Raises:
        UserError: a part of another form.
    """
    rules = []
    for part in _parts(text, source, LAYER_FORM):
        glob, colon, rule = part.partition(":")
        glob = glob.strip()
        if not (colon and glob):
            raise UserError(f"{source}: {part!r} must read {LAYER_FORM}")
        rules.append(LayerRule(glob, *_op_rule(rule, source, LAYER_FORM, part)))
    return rules


def _parts(text: str, source: str, form: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{source}: {text!r} must read {form}; several are separated by commas")
    return parts


def _op_rule(text: str, source: str, form: str, whole: str = "") -> tuple[str, str]:
    op, _, variant = (word.strip() for word in text.partition("="))
    if not (op and variant) or "=" in variant or ":" in text:
        raise UserError(f"{source}: {whole or text!r} must read {form}")
    return op, variant
