"""Policy: which variant of every op is used, resolved once when the model is built.

A preset is a chain of variant names; an op takes the first one that it has. Overrides name single ops::

    PADDLEDSV4_NUMERICS=plain          the preset
    PADDLEDSV4_SINKHORN=paddle         one op
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from paddledsv4.errors import UserError
from paddledsv4.numerics.registry import OPS, load_all

PRESETS: dict[str, tuple[str, ...]] = {
    "paddle": ("paddle",),
    "plain": ("plain", "paddle"),
    "hf": ("hf", "paddle"),
    "megatron": ("megatron",),
    "torch": ("torch",),
}
PRESET_NOTES = {
    "paddle": "fast native Paddle operations",
    "plain": "the textbook formula of every op, differentiated by Paddle's autograd: the definition to test against",
    "megatron": "Megatron's order of operations, casts and gradient sums, on Paddle's kernels",
    "torch": "the same order on torch's kernels: bit-identical where Megatron itself runs on torch",
    "hf": "as Hugging Face transformers and DeepSeek's own code place epsilons, for their weights",
}
PREFIX = "PADDLEDSV4_"
PRESET_VARIABLE = PREFIX + "NUMERICS"


@dataclass(frozen=True)
class Policy:
    """An immutable choice of one variant per op. Build it with :meth:`preset` or :meth:`from_env`."""

    name: str
    choices: Mapping[str, str]

    @classmethod
    def preset(cls, name: str = "paddle", overrides: Mapping[str, str] | None = None) -> Policy:
        """The preset ``name`` with single ops overridden.

        Raises:
            UserError: unknown preset, op or variant; the message lists the legal ones.
        """
        if name not in PRESETS:
            raise UserError(f"numerics {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
        ops, overrides = load_all(), dict(overrides or {})
        for op in overrides:
            if op not in ops:
                raise UserError(f"numerics: there is no op {op!r}; the ops are: {', '.join(sorted(ops))}")
        choices = {}
        for op in ops.values():
            choice = overrides.get(op.name) or next(v for v in (*PRESETS[name], "paddle") if v in op.variants)
            if choice not in op.variants:
                raise UserError(
                    f"numerics: op {op.name} has no variant {choice!r}; it has: {', '.join(op.variants)}"
                )
            choices[op.name] = choice
        return cls(name, choices)

    @classmethod
    def from_env(cls, preset: str | None = None, overrides: Mapping[str, str] | None = None,
                 environ: Mapping[str, str] = os.environ) -> Policy:
        """The policy of the environment: PADDLEDSV4_NUMERICS, then PADDLEDSV4_<OP>, then the arguments, which win.

        Raises:
            UserError: also for a PADDLEDSV4_ variable that names no op.
        """
        by_variable = {op.environment_variable: op.name for op in load_all().values()}
        from_environment = {}
        for variable, value in environ.items():
            if variable == PRESET_VARIABLE or not variable.startswith(PREFIX):
                continue
            if variable not in by_variable:
                raise UserError(
                    f"environment variable {variable} names no op; the variables are: {PRESET_VARIABLE}, "
                    + ", ".join(sorted(by_variable))
                )
            from_environment[by_variable[variable]] = value
        name = preset or environ.get(PRESET_VARIABLE) or "paddle"
        return cls.preset(name, from_environment | dict(overrides or {}))

    def ops(self, emulate_bfloat16: bool = False) -> SimpleNamespace:
        """The chosen function of every op as an attribute: what a layer keeps and calls.

        ``emulate_bfloat16``: for a bfloat16 model on a device without the kernels (numerics/bfloat16.py).
        """
        chosen = {op: OPS[op].variants[choice] for op, choice in self.choices.items()}
        return SimpleNamespace(**{op: (emulate_bfloat16 and v.emulated) or v.function for op, v in chosen.items()})

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that identify the choices; they stand in every log."""
        text = json.dumps(dict(sorted(self.choices.items())), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> dict[str, str]:
        """op -> variant, sorted by op."""
        return dict(sorted(self.choices.items()))

    @staticmethod
    def diff(a: Policy, b: Policy) -> dict[str, tuple[str, str]]:
        """op -> (choice in a, choice in b) where they differ."""
        return {op: (a.choices[op], b.choices[op]) for op in sorted(a.choices) if a.choices[op] != b.choices[op]}
