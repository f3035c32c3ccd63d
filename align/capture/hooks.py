"""Hooks on a Megatron model that record one forward and backward pass under the names of a trace.

Three kinds of places (paddledsv4/weights/names.py): arguments and results of a module, through its own hooks; of a
method, by shadowing it on the instance; and of a function that runs while a module does, by replacing it in every
loaded module of Megatron that holds it. All are taken off when the forward pass ends; gradients still arrive after.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from align.capture.choices import Choices, margins
from align.capture.selection import Selection
from align.capture.stopwatch import Stopwatch
from paddledsv4.weights.names import Traced, traced

TOPK, ROUTING = "fused_qk_topk_naive", "topk_routing_with_score_function"
_AFFINITY = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
    "sqrtsoftplus": lambda logits: logits.float().logaddexp(logits.float().new_zeros(())).sqrt(),
}


def rows_of(model: Any, config: Any) -> list[Traced]:
    """The rows of the table of traces that a model on Megatron's side has."""
    modules = dict(model.named_modules())

    def there(row: Traced) -> bool:
        attention, indexer, _ = row.name.partition(".indexer.")
        has_indexer = not indexer or f"{attention}.core_attention.indexer" in modules
        return row.megatron is not None and row.megatron.layer in modules and has_indexer

    return list(filter(there, traced(config.num_layers, getattr(config, "mtp_num_layers", None) or 0)))


def argument(function: Callable, args: tuple, kwargs: dict, position: int) -> Any:
    """The argument that stands at ``position`` in the signature of ``function``, however it was passed."""
    if position < len(args):
        return args[position]
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_POSITIONAL]
    if position < len(names) and names[position] in kwargs:
        return kwargs[names[position]]
    rest = list(kwargs.values())  # def forward(self, *args, **kwargs) says no names: take them as they were written
    return rest[position - len(args)] if position - len(args) < len(rest) else None


def as_tuple(outputs: Any) -> tuple:
    """Outputs of a module as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


class Pass:
    """Records ``forward``, ``gradients`` and ``choices`` of the forward pass inside its ``with`` block.

    Args:
        to_numpy: copies a torch tensor; bfloat16 becomes its bits.
    """

    def __init__(self, model: Any, selection: Selection, to_numpy: Callable[[Any], np.ndarray], watch: Stopwatch):
        self.model, self.selection, self.to_numpy, self.watch = model, selection, to_numpy, watch
        self.modules = dict(model.named_modules())
        self.forward: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.choices = Choices()
        self._calls: Counter = Counter()
        self._running: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Pass:
        functions: dict[str, list[tuple[str, Callable]]] = defaultdict(list)
        for row in rows_of(self.model, self.model.config):
            at, module = row.megatron, self.modules[row.megatron.layer]
            learns = not getattr(module, "is_hash_layer", False)
            if row.name.endswith(".router.map") and learns and self.selection.wants(row.name):
                functions[ROUTING].append((at.layer, self._routing_margin(row.name)))
            if row.name.endswith(".indexer.topk") and self.selection.wants(row.name):
                functions[TOPK].append((at.layer, self._topk_margin(row.name)))
            if not self.selection.wants(row.name):
                continue
            if at.call is None:
                self._tap_module(module, row)
            elif hasattr(module, at.call):
                self._tap_method(module, row)
            else:
                functions[at.call].append((at.layer, self._picker(row)))
        for layer in {layer for taps in functions.values() for layer, _ in taps}:
            self._tell_when_running(layer)
        for name, taps in functions.items():
            self._tap_function(name, taps)
        return self

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _tap_module(self, module: Any, row: Traced) -> None:
        at = row.megatron
        if at.side == "in":

            def before(_, args, kwargs):
                self.record(row.name, argument(module.forward, args, kwargs, at.position))

            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:

            def after(_, args, outputs):
                self.record(row.name, as_tuple(outputs)[at.position])

            handle = module.register_forward_hook(after)
        self._undo.append(handle.remove)

    def _tap_method(self, module: Any, row: Traced) -> None:
        name, pick = row.megatron.call, self._picker(row)
        shadowed = vars(module).get(name)  # set when another row wraps the same method
        original = getattr(module, name)

        def recording(*args, **kwargs):
            outputs = original(*args, **kwargs)
            pick(original, args, kwargs, outputs)
            return outputs

        object.__setattr__(module, name, recording)
        if shadowed is None:
            self._undo.append(lambda: object.__delattr__(module, name))
        else:
            self._undo.append(lambda: object.__setattr__(module, name, shadowed))

    def _picker(self, row: Traced) -> Callable:
        at = row.megatron

        def pick(function, args, kwargs, outputs):
            given = argument(function, args, kwargs, at.position) if at.side == "in" else None
            self.record(row.name, as_tuple(outputs)[at.position] if at.side == "out" else given)

        return pick

    def _tell_when_running(self, layer: str) -> None:
        module = self.modules[layer]
        for handle in (
            module.register_forward_pre_hook(lambda *_: self._running.append(layer)),
            module.register_forward_hook(lambda *_: self._running.remove(layer)),
        ):
            self._undo.append(handle.remove)

    def _tap_function(self, name: str, taps: list[tuple[str, Callable]]) -> None:
        for holder in list(sys.modules.values()):
            if not getattr(holder, "__name__", "").startswith("megatron") or not callable(vars(holder).get(name)):
                continue
            original = vars(holder)[name]

            def recording(*args, original=original, **kwargs):
                outputs = original(*args, **kwargs)
                for layer, pick in taps:
                    if layer in self._running:
                        pick(original, args, kwargs, outputs)
                return outputs

            setattr(holder, name, recording)
            self._undo.append(lambda holder=holder, original=original: setattr(holder, name, original))

    def _topk_margin(self, name: str) -> Callable:
        def pick(function, args, kwargs, outputs):
            scores, chosen = outputs[0], outputs[1]
            with self.watch:
                self.choices.margin[name] = margins(self.to_numpy(scores.float()), chosen.shape[-1])

        return pick

    def _routing_margin(self, name: str) -> Callable:
        def pick(function, args, kwargs, outputs):
            named = inspect.signature(function).bind(*args, **kwargs).arguments
            score = named.get("score_function", "softmax")
            with self.watch:
                scores = _AFFINITY[score](named["logits"].detach())
                if named.get("expert_bias") is not None:
                    scores = scores + named["expert_bias"]
                self.choices.margin[name] = margins(self.to_numpy(scores), named["topk"])

        return pick

    def not_seen(self) -> list[str]:
        """Wanted names that nothing passed under: another version's code, or a fused kernel, took their place."""
        rows = rows_of(self.model, self.model.config)
        return [row.name for row in rows if self.selection.wants(row.name) and row.name not in self.forward]

    def record(self, name: str, tensor: Any) -> None:
        """Keep a copy, and the gradient when it comes."""
        if tensor is None:
            return
        with self.watch:
            self._calls[name] += 1
            if self._calls[name] > 1:
                name = f"{name}#{self._calls[name]}"
            value = self.to_numpy(tensor)
            if name.endswith(("indexer.topk", "topk_idxs")):
                value = value.astype(np.int32)
            self.forward[name] = value
            if name.endswith((".router.map", ".indexer.topk")):
                self.choices.chosen[name] = value
            if tensor.requires_grad:
                keep = self.watch.timed(lambda gradient: self.gradients.__setitem__(name, self.to_numpy(gradient)))
                tensor.register_hook(keep)
