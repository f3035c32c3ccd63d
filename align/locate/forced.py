"""Run the candidate with every op on the reference's inputs: what it gets, what it makes of it, what flows back.

Each op computes for itself; then its results are replaced by the reference's, and in the backward pass its input
gradients likewise. Nothing an op gets wrong reaches the next one, and discrete choices are the reference's. What lies
between ops, the layers' own code, only moves numbers, so there every bit must agree: an argument or an arriving
gradient that differs is the layers' fault, a result that differs by more than the noise is the op's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from align.locate.distance import MARGIN, Error, describe, rounding_inside, same_bits
from align.locate.reference import Recorded, names_of
from paddledsv4.numerics.registry import load_all
from paddledsv4.observe.ops import as_tuple, tensors_in


class Diverged(Exception):
    """The candidate makes another sequence of calls than the reference; nothing after that can be compared."""


@dataclass
class Event:
    """One comparison, in the order in which the candidate executes.

    Attributes:
        what: "result", "gradient" (of an input), "argument", "arrival" (a gradient reaching a result) or "calls".
        index: which result, input or argument.
        excess: error over noise; infinite where bits had to agree.
        verdict: in words.
    """

    step: int
    path: str
    op: str
    what: str
    index: int | str
    verdict: str
    fault: bool
    excess: float = 0.0
    error: Error | None = None

    @property
    def where(self) -> str:
        return f"{self.path or 'model'}: {self.op}"


class _Replaced(PyLayer):
    """Another tensor's values, with a say in what flows back."""

    @staticmethod
    def forward(ctx, x, value, back):
        ctx.back = back
        return value()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient)


def replaced(x: Tensor, value: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """``value`` in the place of ``x``; ``back`` turns the gradient that arrives into the one that goes on."""
    if x.stop_gradient or not paddle.is_grad_enabled():
        return value.detach().clone()
    return _Replaced.apply(x, lambda: value.detach().clone(), back)


@dataclass
class _Live:
    """One call under way in the candidate."""

    recorded: Recorded
    arrived: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)

    def missing(self) -> tuple[str, int] | None:
        """The first gradient that flows in the reference and not here."""
        for what, wanted, seen in (
            ("arrival", self.recorded.call.gradients, self.arrived), ("gradient", self._gradients(), self.left)
        ):
            for index, gradient in wanted.items():
                if index not in seen and bool((gradient.astype("float32") != 0).any()):
                    return what, index
        return None

    def _gradients(self) -> dict[int, Tensor]:
        return {i: g for i, g in enumerate(self.recorded.gradients) if g is not None}


class ForcedRun:
    """Context manager around the candidate's steps; ``events`` holds every comparison."""

    def __init__(self, model: nn.Layer, recorded: list[Recorded], progress: Callable[[], None] = lambda: None):
        self.model, self.recorded, self.progress = model, recorded, progress
        self.names = names_of(model)
        self.events: list[Event] = []
        self._position = 0
        self._live: list[_Live] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> ForcedRun:
        for path, layer in [("", self.model), *self.model.named_sublayers()]:
            for name in vars(layer.ops).keys() & load_all() if hasattr(layer, "ops") else ():
                self._wrap(layer, path, name)
        return self

    def __exit__(self, *exception) -> None:
        for undo in reversed(self._undo):
            undo()

    def finish_step(self, step: int) -> None:
        """Call after each step: whether the reference had more to do in it."""
        self._check_flow()
        left = self._position < len(self.recorded) and self.recorded[self._position]
        if left and left.step == step:
            self._event(left, "calls", "", "the candidate ends without this call", True)
            raise Diverged

    def _check_flow(self) -> None:
        """Report a gradient that flows in the reference and not here, once a backward pass is over. The last call made
        is the first in the backward pass, so the first one found names the place."""
        if not any(live.arrived or live.left for live in self._live):
            return
        for live in reversed(self._live):
            if missing := live.missing():
                verdict = "no gradient arrives" if missing[0] == "arrival" else "the op sends no gradient to this input"
                self._event(live.recorded, *missing, verdict, True)
                break
        self._live.clear()

    def _event(self, recorded: Recorded, what: str, index, verdict: str, fault: bool, excess=None, error=None) -> None:
        excess = (float("inf") if fault else 0.0) if excess is None else excess
        call = recorded.call
        self.events.append(Event(recorded.step, call.path, call.op, what, index, verdict, fault, excess, error))

    def _wrap(self, layer: nn.Layer, path: str, name: str) -> None:
        original = getattr(layer.ops, name)
        setattr(layer.ops, name, lambda *args, **kwargs: self._call(original, path, name, args, kwargs))
        self._undo.append(lambda: setattr(layer.ops, name, original))

    # ---- forward

    def _call(self, original: Callable, path: str, name: str, args: tuple, kwargs: dict):
        self._check_flow()
        recorded = self._next(path, name)
        live = _Live(recorded)
        self._live.append(live)
        agree = self._compare_arguments(recorded, args, kwargs)
        args, kwargs = self._tap_inputs(live, args, kwargs)
        outputs = original(*args, **kwargs)
        results = list(as_tuple(outputs)) or tensors_in(list(args))
        if agree:
            self._compare_results(recorded, results)
        if not as_tuple(outputs):  # in place
            for ours, reference in zip(results, recorded.results, strict=True):
                paddle.assign(reference, ours)
            return outputs
        forced = [self._force(live, i, x) for i, x in enumerate(results)]
        return type(outputs)(forced) if isinstance(outputs, tuple | list) else forced[0]

    def _next(self, path: str, name: str) -> Recorded:
        if self._position == len(self.recorded):
            raise Diverged
        recorded = self.recorded[self._position]
        self._position += 1
        self.progress()
        if (recorded.call.path, recorded.call.op) != (path, name):
            self._event(recorded, "calls", "", f"the candidate calls {path or 'model'}: {name} instead", True)
            raise Diverged
        return recorded

    def _compare_arguments(self, recorded: Recorded, args: tuple, kwargs: dict) -> bool:
        call = recorded.call
        given = dict(enumerate(args)) | kwargs
        wanted = dict(enumerate(call.args)) | call.kwargs
        for key in wanted.keys() | given.keys():
            ours, reference = given.get(key), wanted.get(key)
            cut = recorded.call.in_graph and _wants_gradient(reference) and not _wants_gradient(ours)
            if cut:
                self._event(recorded, "argument", key, f"argument {key} is cut off from the graph", True)
                return False
            if not same_bits(ours, reference):
                self._event(recorded, "argument", key, self._difference(key, ours, reference), True)
                return False
        return True

    def _difference(self, key, ours, reference) -> str:
        name = f"argument {key}"
        if isinstance(ours, list | tuple) and isinstance(reference, list | tuple) and len(ours) == len(reference):
            ours, reference = _unlike(ours, reference)
            name = f"an element of {name}"
        if isinstance(ours, Tensor) and isinstance(reference, Tensor):
            owner = self.names.get(id(ours))
            name = f"parameter or buffer {owner}" if owner else name
            if ours.shape != reference.shape or ours.dtype != reference.dtype:
                return f"{name} is {ours.dtype} {ours.shape}, the reference's {reference.dtype} {reference.shape}"
            error = Error.of(ours, reference)
            return f"{name}: {1 - error.equal:.2%} of its elements differ, relative error {error.rms:.2e}"
        return f"{name} is {_short(ours)}, the reference's {_short(reference)}"

    def _compare_results(self, recorded: Recorded, results: list) -> None:
        for i, (ours, reference, noise) in enumerate(
            zip(results, recorded.results, recorded.result_noise, strict=True)
        ):
            ours, reference = _as_sets(recorded.call.op, ours, reference)
            self._judge(recorded, "result", i, ours, reference, noise)

    def _judge(self, recorded: Recorded, what: str, index: int, ours, reference, noise) -> None:
        if same_bits(ours, reference):
            self._event(recorded, what, index, "identical", False, 0.0, Error(0.0, 0.0, 0.0, 0.0, 1.0, 0))
            return
        error = Error.of(ours, reference)
        if recorded.exact:
            excess = float("inf")
            verdict = f"differs in {1 - error.equal:.2%} of its elements, relative error {error.rms:.1e}"
        else:
            excess = noise.excess(error, rounding_inside(reference if reference is not None else ours))
            verdict = describe(ours, reference, error, excess)
        self._event(recorded, what, index, verdict, excess > MARGIN, excess, error)

    def _force(self, live: _Live, index: int, output):
        reference = live.recorded.results[index]
        if not isinstance(output, Tensor):
            return reference
        return replaced(output, reference, lambda g: self._arrived(live, index, g))

    # ---- backward

    def _tap_inputs(self, live: _Live, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The inputs that want a gradient in the reference, numbered as :func:`align.calls.replay` numbers them."""
        call, count = live.recorded.call, iter(range(10**9))

        def tap(x, reference):
            if isinstance(x, list | tuple):
                return type(x)(map(tap, x, reference))
            if not _wants_gradient(reference):
                return x
            index = next(count)
            return replaced(x, x, lambda g: self._left(live, index, g)) if _wants_gradient(x) else x

        if not call.in_graph or len(args) != len(call.args) or kwargs.keys() != call.kwargs.keys():
            return args, kwargs
        return tuple(map(tap, args, call.args)), {name: tap(x, call.kwargs[name]) for name, x in kwargs.items()}

    def _arrived(self, live: _Live, index: int, gradient: Tensor) -> Tensor:
        """A gradient at a result: the reference's to the bit, since all ops behind it gave the reference's."""
        live.arrived.add(index)
        reference = live.recorded.call.gradients.get(index)
        if reference is None:
            return gradient
        if not same_bits(gradient, reference):
            error = Error.of(gradient, reference)
            verdict = f"the gradient that arrives differs, relative error {error.rms:.2e}"
            self._event(live.recorded, "arrival", index, verdict, True, None, error)
        return reference.clone()

    def _left(self, live: _Live, index: int, gradient: Tensor) -> Tensor:
        """A gradient that the op gives to an input."""
        live.left.add(index)
        if index >= len(live.recorded.gradients):
            return gradient
        reference, noise = live.recorded.gradients[index], live.recorded.gradient_noise[index]
        self._judge(live.recorded, "gradient", index, gradient, reference, noise)
        return paddle.zeros_like(gradient) if reference is None else reference.clone()


def _as_sets(op: str, ours, reference):
    """Chosen entries without their order, which no later op sees; everything else as it is."""
    if op not in ("router_topk", "indexer_topk") or ours.shape != reference.shape:
        return ours, reference
    return paddle.sort(ours, -1), paddle.sort(reference, -1)


def _wants_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.stop_gradient


def _short(x: Any) -> str:
    return f"a tensor {x.shape}" if isinstance(x, Tensor) else repr(x)


def _unlike(ours: list, reference: list) -> tuple[Any, Any]:
    """The first pair of elements that differ."""
    return next((a, b) for a, b in zip(ours, reference, strict=True) if not same_bits(a, b))
