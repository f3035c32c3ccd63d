"""Policy: which variant of every op is used, resolved once when the model is built.

A preset is a chain of variant names; an op takes the first one that it has. Overrides name single ops, or the ops
of some layers (see :mod:`paddledsv4.numerics.rules`)::

    PADDLEDSV4_NUMERICS=plain                                          the preset
    PADDLEDSV4_SINKHORN=paddle                                         one op
    PADDLEDSV4_NUMERICS_LAYERS="decoder.layers.2.*:swiglu=paddle"      one op in some layers
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

from paddledsv4.errors import UserError
from paddledsv4.numerics.registry import FOLLOWERS, OPS, Op, Variant, installed, load_all
from paddledsv4.numerics.rules import LayerRule, Overrides, layer_rules
from paddledsv4.numerics.settings import SETTINGS

PRESETS: dict[str, tuple[str, ...]] = {
    "paddle": ("paddle",),
    "plain": ("plain", "paddle"),
    "hf": ("hf", "paddle"),
    "megatron": ("megatron",),
    "torch": ("torch",),
    "auto": ("fused", "paddle"),
}
PRESET_NOTES = {
    "paddle": "fast native Paddle operations",
    "plain": "the textbook formula of every op, differentiated by Paddle's autograd: the definition to test against",
    "megatron": "Megatron's order of operations, casts and gradient sums, on Paddle's kernels",
    "torch": "the same order on torch's kernels: bit-identical where Megatron itself runs on torch",
    "auto": "the fused kernel of every op that has one and can run it here, paddle otherwise; says which and why not",
    "hf": "as Hugging Face transformers and DeepSeek's own code place epsilons, for their weights",
}
AUTO = "auto"  # the one preset that asks what the machine can do
PREFIX = "PADDLEDSV4_"
PRESET_VARIABLE = PREFIX + "NUMERICS"
LAYERS_VARIABLE = PREFIX + "NUMERICS_LAYERS"


@dataclass(frozen=True)
class Policy:
    """An immutable choice of one variant per op, and of others in some layers.

    Build it with :meth:`preset` or :meth:`from_env`.
    """

    name: str
    choices: Mapping[str, str]
    layers: tuple[LayerRule, ...] = ()
    passed_over: Mapping[str, str] = field(default_factory=dict, compare=False)  # op -> why auto left its kernel out

    @classmethod
    def preset(cls, name: str = "paddle", overrides: Mapping[str, str] | None = None,
               layers: Iterable[LayerRule] = ()) -> Policy:
        """The preset ``name`` with single ops overridden, and then those of some layers.

        Raises:
            UserError: unknown preset, op or variant (the message lists the legal ones), or a variant whose package
                is not installed.
        """
        if name not in PRESETS:
            raise UserError(f"numerics {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
        ops, overrides = load_all(), dict(overrides or {})
        for op in overrides:
            _known(op)
        choices, passed_over = {}, {}
        for op in ops.values():
            candidates = [op.variants[v] for v in (*PRESETS[name], "paddle") if v in op.variants]
            if name == AUTO and op.name not in overrides and (missing := candidates[0].missing()):
                passed_over[op.name] = f"{candidates.pop(0).name}: {missing}"
            choices[op.name] = overrides.get(op.name) or candidates[0].name
            check_usable(op, choices[op.name])
        if name == AUTO:
            passed_over |= {op.name: reason for op in FOLLOWERS.values() if (reason := _passed_over(op, overrides))}
        kept: dict[tuple[str, str], LayerRule] = {}
        for rule in layers:
            check_usable(_known(rule.op), rule.variant)
            kept.pop((rule.glob, rule.op), None)
            kept[rule.glob, rule.op] = rule
        return cls(name, choices, tuple(kept.values()), passed_over)

    @classmethod
    def from_env(cls, preset: str | None = None, overrides: Overrides | Mapping[str, str] | None = None,
                 environ: Mapping[str, str] = os.environ) -> Policy:
        """The policy of the environment: PADDLEDSV4_NUMERICS, PADDLEDSV4_<OP> and PADDLEDSV4_NUMERICS_LAYERS, then
        the arguments, which win.

        Raises:
            UserError: as :meth:`preset`; also for a PADDLEDSV4_ variable that names no op, or a malformed one.
        """
        by_variable = {op.environment_variable: op.name for op in load_all().values()}
        settings = [setting.environment_variable for setting in SETTINGS]
        chosen = {}
        for variable, value in environ.items():
            if variable in (PRESET_VARIABLE, LAYERS_VARIABLE, *settings) or not variable.startswith(PREFIX):
                continue
            if variable not in by_variable:
                raise UserError(
                    f"environment variable {variable} names no op; the variables are: {PRESET_VARIABLE}, "
                    f"{LAYERS_VARIABLE}, " + ", ".join(sorted([*by_variable, *settings]))
                )
            chosen[by_variable[variable]] = value
        text = environ.get(LAYERS_VARIABLE)
        from_environment = Overrides(chosen, tuple(layer_rules(text, LAYERS_VARIABLE)) if text else ())
        given = overrides if isinstance(overrides, Overrides) else Overrides(dict(overrides or {}))
        both = from_environment.then(given)
        return cls.preset(preset or environ.get(PRESET_VARIABLE) or "paddle", both.ops, both.layers)

    def at(self, path: str = "") -> dict[str, str]:
        """op -> variant for the layer at ``path``; "" is the model itself, its optimizer and its step."""
        return {**self.choices, **{rule.op: rule.variant for rule in self.layers if rule.matches(path)}}

    def ops(self, path: str = "", emulate_bfloat16: bool = False) -> SimpleNamespace:
        """The chosen function of every op as an attribute: what the layer at ``path`` keeps and calls.

        ``emulate_bfloat16``: for a bfloat16 model on a device without the kernels (numerics/bfloat16.py).
        """
        chosen = {op: OPS[op].variants[choice] for op, choice in self.at(path).items()}
        return SimpleNamespace(**{op: (emulate_bfloat16 and v.emulated) or v.function for op, v in chosen.items()})

    def follower(self, op: Op, path: str = "") -> Variant:
        """What is chosen at ``path`` for an op outside the table; ``auto`` takes its kernel where it can run."""
        choice = self.at(path)[op.follows]
        if self.name == AUTO and choice == "paddle" and "fused" in op.variants and op.name not in self.passed_over:
            choice = "fused"
        return op.variants.get(choice) or op.variants["paddle"]

    def check_layers(self, paths: Iterable[str]) -> None:
        """Whether every layer rule means some layer of a model whose layers with ops are at ``paths``.

        Raises:
            UserError: one that means none; the message gives the paths to choose from.
        """
        paths = sorted(paths)
        for rule in self.layers:
            if not any(rule.matches(path) for path in paths):
                raise UserError(
                    f"numerics: {str(rule)!r} matches no layer of this model; its layers are: {', '.join(paths)}"
                )

    @property
    def remarks(self) -> list[str]:
        """One line for each reason why ops do not use their kernel, with those ops."""
        ops: dict[str, list[str]] = {}
        for op, reason in sorted(self.passed_over.items()):
            ops.setdefault(reason, []).append(op)
        return [f"{self.name}: not {reason} ({', '.join(names)})" for reason, names in ops.items()]

    @property
    def label(self) -> str:
        """The preset's name; with the fingerprint when anything deviates from the preset. Fit for a file's name."""
        pure = not self.layers and self.choices == Policy.preset(self.name).choices
        return self.name if pure else f"{self.name}-{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that identify the choices; they stand in every log."""
        text = json.dumps(self.describe(), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> dict[str, str]:
        """op -> variant, sorted by op; then "glob:op" -> variant for the layer rules, in their order."""
        return dict(sorted(self.choices.items())) | {f"{rule.glob}:{rule.op}": rule.variant for rule in self.layers}

    @staticmethod
    def diff(a: Policy, b: Policy) -> dict[str, tuple[str, str]]:
        """op -> (choice in a, choice in b) where they differ; "layers" -> all layer rules of each if those do."""
        differing = {op: (a.choices[op], b.choices[op]) for op in sorted(a.choices) if a.choices[op] != b.choices[op]}
        if a.layers != b.layers:
            differing["layers"] = (",".join(map(str, a.layers)), ",".join(map(str, b.layers)))
        return differing


def _known(op: str) -> Op:
    if op not in OPS:
        raise UserError(f"numerics: there is no op {op!r}; the ops are: {', '.join(sorted(OPS))}")
    return OPS[op]


def _passed_over(op: Op, overrides: Mapping[str, str]) -> str:
    """Why ``auto`` leaves out the kernel of an op outside the table; "" if it does not."""
    if "fused" not in op.variants:
        return ""
    missing = f"{op.follows} is set" if op.follows in overrides else op.variants["fused"].missing()
    return missing and f"fused: {missing}"


def check_usable(op: Op, choice: str) -> None:
    """Raise unless ``op`` has the variant and what it needs is installed."""
    if choice not in op.variants:
        raise UserError(f"numerics: op {op.name} has no variant {choice!r}; it has: {', '.join(op.variants)}")
    variant = op.variants[choice]
    if variant.needs and not installed(variant.needs):
        raise UserError(
            f"numerics: variant {choice} of op {op.name} needs {variant.needs}, which is not installed: "
            f'pip install "paddledsv4[{variant.needs}]", or choose another preset, such as megatron'
        )
    if missing := variant.missing():
        raise UserError(f"numerics: variant {choice} of op {op.name} cannot run here: {missing}; choose another one")

