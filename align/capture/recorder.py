"""Hooks on our own trainer that record chosen microbatches and steps, from outside.

The methods that a step goes through (the model's losses, the optimizer's accumulate and step) are shadowed on their
instances, and the ops that choose (router and indexer) in their layers' tables of ops.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from align.capture.choices import Choices, causal, margins
from align.capture.selection import Selection
from align.capture.stopwatch import Stopwatch
from align.capture.store import Folder, trace_folder
from align.hashing import tensor_md5
from align.trace import Tracer, taps_of
from paddledsv4.training.optimizer import ParameterState
from paddledsv4.training.step import StepResult
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors


class Recorder:
    """Context manager around training; ``watch`` counts the seconds that recording takes.

    ``inside`` is the part of them that fell into the last step's own time.

    Raises:
        UserError: a glob of the selection matches no name of the model.
    """

    def __init__(self, trainer: Trainer, selection: Selection, folder: Folder) -> None:
        self.trainer, self.selection, self.folder = trainer, selection, folder
        self.model, self.optimizer = trainer.model, trainer.optimizer
        layers = dict(self.model.named_sublayers())
        known = [tap.name for tap in taps_of(self.model) if tap.layer in layers]
        selection.check_names(known + [name for name, _ in self.model.named_parameters()])
        self.watch = Stopwatch()
        self.inside = 0.0
        self._microbatch = 0
        self._pending: dict[int, tuple[Tracer, Choices]] = {}
        self._gradients: dict[str, np.ndarray] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def step(self) -> int:
        """Number of the step in progress, from 1."""
        return self.optimizer.step_count + 1

    def __enter__(self) -> Self:
        self._shadow(self.model, "losses", self._losses)
        self._shadow(self.optimizer, "step", self._step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _shadow(self, owner: Any, name: str, around: Callable) -> None:
        original = getattr(owner, name)
        object.__setattr__(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))
        self._undo.append(lambda: object.__delattr__(owner, name))

    def _losses(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of one microbatch."""
        index, self._microbatch = self._microbatch, self._microbatch + 1
        if self.step not in self.selection.steps or index not in self.selection.microbatches:
            return original(*args, **kwargs)
        tracer = TimedTracer(self.model, self.selection.pattern, self.watch)
        choices = Choices()
        self._pending[index] = (tracer, choices)
        with tracer, ChoiceTaps(self.model, self.selection, choices, self.watch):
            return original(*args, **kwargs)

    def _step(self, original: Callable, *args: Any, **kwargs: Any) -> float:
        """The optimizer's step: gradients are complete before it, and gone after."""
        with self.watch:
            if self.step in self.selection.steps and "param_grads" in self.selection.what:
                self._gradients = {s.name: s.main_grad.numpy() for s in self._states()}
        return original(*args, **kwargs)

    def _states(self) -> list[ParameterState]:
        """What the optimizer keeps of the wanted parameters, in the model's order."""
        states = {state.name: state for state in self.optimizer.states}
        return [states[name] for name, _ in self.model.named_parameters() if self.selection.wants(name)]

    def end_step(self, result: StepResult) -> None:
        """Write what belongs to a step that is done."""
        self.inside = self.watch.seconds
        with self.watch:
            if result.step in self.selection.steps:
                self._write(result)
        self._microbatch, self._pending, self._gradients = 0, {}, {}

    def _write(self, result: StepResult) -> None:
        what, where = self.selection.what, trace_folder(result.step)
        for index, (tracer, choices) in self._pending.items():
            at = trace_folder(result.step, index)
            if "forward" in what:
                self.folder.tensors(f"{at}/forward", tracer.forward | self._ends(result, index))
            if "gradients" in what:
                self.folder.tensors(f"{at}/activation_grads", tracer.gradients, norms=True)
            if "choices" in what:
                choices.chosen = {n: t for n, t in tracer.forward.items() if n.endswith(CHOSEN)}
                choices.write(self.folder, at)
        if self._gradients:
            self.folder.tensors(f"{where}/param_grads", self._gradients, norms=True)
        if "optimizer" in what:
            kept = {f"{k}/{s.name}": getattr(s, k).numpy() for s in self._states() for k in ("m", "v", "master")}
            if kept:
                self.folder.tensors(f"{where}/optimizer", kept)
        parameters = {name for name, _ in self.model.named_parameters()}
        md5s = {name: tensor_md5(t.numpy()) for name, t in named_tensors(self.model).items()}
        after = {"params": {n: m for n, m in md5s.items() if n in parameters},
                 "buffers": {n: m for n, m in md5s.items() if n not in parameters}}  # fmt: skip
        self.folder.json(f"{where}/after_step{result.step}.json", after)

    def _ends(self, result: StepResult, index: int) -> dict[str, np.ndarray]:
        """The scalars that a trace ends with."""
        loss = result.losses[index]
        dtype = np.float64 if self.trainer.precision == "fp64" else np.float32
        ends = {"main_loss_mean": np.array(loss.main, dtype)}
        if loss.mtp is not None:
            ends["mtp_loss_mean"] = np.array(loss.mtp, dtype)
        return self.selection.only(ends | {f"grad_norm_step{result.step}": np.array(result.grad_norm, np.float64)})


CHOSEN = (".router.map", ".indexer.topk")


class TimedTracer(Tracer):
    """A tracer whose time is counted."""

    def __init__(self, model: Any, names: str, watch: Stopwatch) -> None:
        super().__init__(model, names)
        self._record = watch.timed(self._record)
        self._keep = watch.timed(self._keep)


class ChoiceTaps:
    """Context manager that computes the margins of every top-k in the forward pass within."""

    def __init__(self, model: Any, selection: Selection, choices: Choices, watch: Stopwatch) -> None:
        self.layers, self.selection, self.choices, self.watch = model.named_sublayers(), selection, choices, watch
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        for path, layer in self.layers:
            if path.endswith(".mlp.router") and hasattr(layer, "expert_bias"):
                self._tap(layer.ops, "router_topk", f"{path}.map", self._of_router)
            if path.endswith(".core_attention.indexer"):
                at = path.removesuffix(".core_attention.indexer")
                self._tap(layer.ops, "indexer_topk", f"{at}.indexer.topk", self._of_indexer)
        return self

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def _tap(self, ops: Any, op: str, name: str, margin: Callable) -> None:
        if not self.selection.wants(name):
            return
        original = getattr(ops, op)

        def recording(*args, **kwargs):
            chosen = original(*args, **kwargs)
            with self.watch:
                self.choices.margin[name] = margin(*args, **kwargs)
            return chosen

        setattr(ops, op, recording)
        self._undo.append(lambda: setattr(ops, op, original))

    @staticmethod
    def _of_router(scores: Any, bias: Any, k: int) -> np.ndarray:
        return margins((scores + bias).numpy(), k)

    @staticmethod
    def _of_indexer(scores: Any, k: int, ratio: int, offset: int) -> np.ndarray:
        scores = scores.astype("float32").numpy()
        return margins(causal(scores, ratio, offset), min(k, scores.shape[-1]))
