"""The one table of numeric choices: every operation, its variants, and what tells them apart.

An op is a small function with a contract; its variants compute the same formula and differ in rounding, order
or speed. A file of ``paddledsv4/ops`` defines its op and registers the variants side by side::

    rms_norm = define("rms_norm", "RMS normalisation with a weight", spec="0")

    @rms_norm.variant("paddle", "native, hand-written backward")
    def paddle_rms_norm(x, weight, eps): ...
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

from paddledsv4.numerics.bfloat16 import at_the_boundary


def installed(package: str) -> bool:
    """Whether ``package`` can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def runs_anywhere() -> str:
    """Nothing speaks against it."""
    return ""


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        note: in one line, what differs from the others.
        needs: the package that must be installed, "" for none beyond the requirements.
        same_bits: why, in float32 on a CPU, this variant gives the bits of ``megatron``; "" where it does not.
        emulated: the function for bfloat16 on a device without bfloat16 kernels.
        refuses: why it cannot run on this machine, "" where it can; asked when the variant is chosen.
    """

    name: str
    function: Callable
    note: str
    needs: str = ""
    same_bits: str = ""
    emulated: Callable | None = None
    refuses: Callable[[], str] = runs_anywhere

    def missing(self) -> str:
        """What this machine lacks for the variant, in a few words; "" if nothing."""
        if self.needs and not installed(self.needs):
            return f"{self.needs} is not installed"
        return self.refuses()


@dataclass(frozen=True)
class Op:
    """A numeric operation: its name, its meaning, where the reference's order is specified, its outputs.

    ``wide`` names the outputs that are float32 or wider whatever the activations are; ``follows``, for an op outside
    the table, the op whose switch decides for it too.
    """

    name: str
    summary: str
    spec: str
    outputs: tuple[str, ...] = ("out",)
    wide: tuple[str, ...] = ()
    follows: str = ""
    variants: dict[str, Variant] = field(default_factory=dict)

    def variant(
        self, name: str, note: str, needs: str = "", same_bits: str = "", emulated: Callable | None = None,
        refuses: Callable[[], str] = runs_anywhere,
    ) -> Callable[[Callable], Callable]:
        """Register the decorated function as variant ``name``; the arguments are those of :class:`Variant`.

        Without ``emulated``, bfloat16 is emulated by the function in float32, rounded at its outputs.
        """

        def register(function: Callable) -> Callable:
            if name in self.variants:
                raise ValueError(f"op {self.name} already has a variant {name}")
            narrow = emulated or at_the_boundary(function, self.outputs, self.wide)
            self.variants[name] = Variant(name, function, note, needs, same_bits, narrow, refuses)
            return function

        return register

    @property
    def environment_variable(self) -> str:
        """The variable that overrides the choice for this op."""
        return f"PADDLEDSV4_{self.name.upper()}"


OPS: dict[str, Op] = {}
FOLLOWERS: dict[str, Op] = {}  # ops outside the table


def define(
    name: str, summary: str, spec: str, outputs: tuple[str, ...] = ("out",), wide: tuple[str, ...] = ()
) -> Op:
    """Add an op to the table. ``spec`` names the sections of megatron-dsv4-spec.md that fix its order."""
    if name in OPS:
        raise ValueError(f"op {name} is defined twice")
    OPS[name] = Op(name, summary, spec, outputs, wide)
    return OPS[name]


def follower(name: str, summary: str, spec: str, follows: str, outputs: tuple[str, ...] = ("out",),
             wide: tuple[str, ...] = ()) -> Op:
    """An op outside the table: one that stands for several, or for a part of one. The switch of the op ``follows``
    decides for it; where it has no variant of that name, ``paddle`` is taken."""
    FOLLOWERS[name] = Op(name, summary, spec, outputs, wide, follows)
    return FOLLOWERS[name]


def load_all() -> dict[str, Op]:
    """Import every op, so that the table is complete, and return it."""
    import paddledsv4.fusions.variants  # noqa: F401  (importing registers, and imports the ops)

    return OPS
