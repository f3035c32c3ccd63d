"""Record a Megatron training run as a bundle, by two lines in the script that starts it::

    from align.capture.megatron import capture
    capture("out/bundle")

The two lines stand anywhere before training begins. Nothing of the job changes: classes of Megatron are watched, the
first model that trains is recorded with its weights, tokens and losses, and after ``steps`` optimizer steps (or when
the process ends) the bundle is written, complete or not at all. With several ranks each writes ``out/bundle/rank00000``
and so on, which ``align merge`` puts together.

torch and Megatron are those of the job. Nothing of Megatron is imported until ``capture`` is called.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.capture.hooks import Pass, rows_of
from align.capture.job import JobRecord, MicrobatchRecord
from align.capture.selection import KINDS, Selection
from align.capture.stopwatch import Stopwatch
from align.hashing import tensor_md5
from paddledsv4.errors import UserError
from paddledsv4.weights.names import BUFFERS, from_megatron

MODEL = ("megatron.core.models.gpt.gpt_model", "GPTModel")
OPTIMIZER = ("megatron.core.optimizer.optimizer", "MegatronOptimizer")
MTP_LOSSES = ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper")


def capture(
    out: str | Path,
    steps: int = 3,
    trace_steps: Sequence[int] = (1,),
    microbatches: Sequence[int] = (0,),
    names: Sequence[str] = ("*",),
    what: Sequence[str] = KINDS,
    training: dict[str, Any] | None = None,
) -> Capture:
    """Start watching this process.

    Args:
        out: where the bundle appears; must not be there yet.
        steps: optimizer steps whose losses and tokens are recorded.
        trace_steps, microbatches: which of them are traced, steps from 1 and microbatches from 0.
        names: globs of trace and parameter names, * runs over dots.
        what: kinds of tensors, see align/capture/__init__.py.
        training: entries for bundle.json's ``training`` that cannot be seen from here, such as
            ``{"optimizer": {"schedule": "cosine", "lr": 1e-3, ...}}``.

    Raises:
        UserError: Megatron, or a class of it that is watched, is not there; or ``out`` is taken.
    """
    selection = Selection(tuple(trace_steps), tuple(microbatches), tuple(names), tuple(what))
    if steps < max(selection.steps):
        raise UserError(f"capture: trace_steps names step {max(selection.steps)}, but steps is {steps}")
    return Capture(Path(out), steps, selection, training or {})


def find(place: tuple[str, str]) -> Any:
    """A class of the Megatron that this process runs.

    Raises:
        UserError: it cannot be imported, or is not where it is looked for.
    """
    module, name = place
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"capture needs {name} of {module}, and {error.name} cannot be imported: call it in a Megatron job"
        ) from None
    except AttributeError:
        raise UserError(f"{module} of this Megatron has no class {name}, which capture watches") from None


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An own copy in C order on the host; bfloat16 as the uint16 of its bits, float8 as bytes."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
    if copy.dtype == torch.bfloat16:
        return copy.view(torch.int16).numpy().view(np.uint16)
    return copy.view(torch.uint8).numpy() if copy.dtype.itemsize == 1 and copy.is_floating_point() else copy.numpy()


class Capture:
    """A running capture; it ends by itself."""

    def __init__(self, out: Path, steps: int, selection: Selection, training: dict[str, Any]) -> None:
        self.out, self.steps, self.selection, self.training = out, steps, selection, training
        self.watch = Stopwatch()
        self.model: Any = None
        self.record: JobRecord | None = None
        self.done = False
        self._mtp: list[torch.Tensor] = []
        self._gradients: dict[str, np.ndarray] = {}
        self._depth = 0
        self._undo: list[Callable[[], None]] = []
        if out.exists() and (not out.is_dir() or any((*out.glob("bundle.json"), *out.glob("rank*/bundle.json")))):
            raise UserError(f"{out} is there already: choose another folder for capture, or remove it")
        classes = [find(place) for place in (MODEL, OPTIMIZER)]
        self._wrap(classes[0], "forward", self._forward)
        for optimizer in {classes[1], *_subclasses(classes[1])}:
            if inspect.isfunction(vars(optimizer).get("step")):
                self._wrap(optimizer, "step", self._step)
        atexit.register(self.finish)

    def _wrap(self, owner: type, name: str, around: Callable) -> None:
        original = vars(owner)[name]

        def wrapped(this, *args, **kwargs):
            return around(original, this, args, kwargs)

        wrapped.__wrapped__ = original  # what inspect.signature follows
        setattr(owner, name, wrapped)
        self._undo.append(lambda: setattr(owner, name, original))

    def _forward(self, original: Callable, model: Any, args: tuple, kwargs: dict) -> Any:
        if self.done or not (model.training and torch.is_grad_enabled()) or self.model not in (None, model):
            return original(model, *args, **kwargs)
        if self.model is None:
            self._begin(model)
        given = inspect.signature(original).bind(model, *args, **kwargs).arguments
        wanted = self.record.wants_trace()
        trace = Pass(model, self.selection, to_numpy, self.watch) if wanted else None
        self._mtp.clear()
        with trace or nullcontext():
            outputs = original(model, *args, **kwargs)
        with self.watch:
            self.record.add(self._microbatch(given, outputs), trace)
        return outputs

    def _begin(self, model: Any) -> None:
        """The first forward pass in training: weights are what they start from."""
        with self.watch:
            known = [row.name for row in rows_of(model, model.config)]
            self.selection.check_names(known + [name for name, _ in model.named_parameters()])
            self.model = model
            if model.config.mtp_num_layers:
                self._watch_mtp_losses()
            self.record = JobRecord(self.out, self.selection, self.steps, self.training)
            self.record.initial = _tensors(model)
            print(f"capture: recording {self.steps} steps of {type(model).__name__}", file=sys.stderr)

    def _watch_mtp_losses(self) -> None:
        helper = find(MTP_LOSSES)
        before = vars(helper)["save_loss_to_tracker"]
        original = helper.save_loss_to_tracker
        signature = inspect.signature(original)

        def saving(*args, **kwargs):
            loss, counted = args[0] if args else next(iter(kwargs.values())), None
            if "num_tokens" in signature.parameters:  # versions without it hand over the mean
                counted = signature.bind(*args, **kwargs).arguments["num_tokens"]
            self._mtp.append((loss.detach() if counted is None else loss.detach() / counted).float().clone())
            return original(*args, **kwargs)

        helper.save_loss_to_tracker = staticmethod(saving)
        self._undo.append(lambda: setattr(helper, "save_loss_to_tracker", before))

    def _microbatch(self, given: dict[str, Any], losses: Any) -> MicrobatchRecord:
        """Means over the tokens as Megatron's own loss function takes them: sum of the masked losses / count."""
        labels, mask = given.get("labels"), given.get("loss_mask")
        if labels is None or not isinstance(losses, torch.Tensor):
            raise UserError("capture: the model was called without labels, so it gave no losses; pass labels")
        losses = losses.detach()
        mask = torch.ones_like(losses) if mask is None else mask
        flat = mask.reshape(-1).float()
        mean = torch.sum(losses.reshape(-1).float() * flat) / flat.sum().to(torch.int)
        mtp = None
        if self._mtp:
            total = self._mtp[0]
            for loss in self._mtp[1:]:
                total = total + loss
            mtp = to_numpy(total / len(self._mtp))
        tokens = np.concatenate([to_numpy(given["input_ids"]), to_numpy(labels)[:, -1:]], 1)
        if not np.array_equal(tokens[:, 1:], to_numpy(labels)) or not bool((flat == 1).all()):
            raise UserError("capture: labels must be the inputs one token ahead, and the loss mask all ones")
        return MicrobatchRecord(tokens, to_numpy(losses), to_numpy(mean), mtp)

    def _step(self, original: Callable, optimizer: Any, args: tuple, kwargs: dict) -> Any:
        if self.done or self._depth or self.record is None or not self.record.microbatches:
            return original(optimizer, *args, **kwargs)
        step, self._gradients = self.record.step, {}
        if step in self.selection.steps and "param_grads" in self.selection.what:
            with self.watch:
                self._gradients = self._main_gradients(optimizer)
        rate = float(optimizer.param_groups[0]["lr"])
        self._depth += 1
        try:
            result = original(optimizer, *args, **kwargs)
        finally:
            self._depth -= 1
        with self.watch:
            self._after_step(optimizer, rate, result)
        self.record.seconds.append(self.watch.lap())
        if self.record.step > self.steps:
            self.finish()
        return result

    def _main_gradients(self, optimizer: Any) -> dict[str, np.ndarray]:
        """What the optimizer is about to use: the summed gradient, in float32 where the job accumulates so."""
        sharded = any(type(leaf).__name__ == "DistributedOptimizer" for leaf in _leaves(optimizer))
        if sharded and self.record.parallel["data"] > 1:
            self.record.notes["no parameter gradients: with a distributed optimizer each rank has but a shard"] = None
            return {}
        found = {}
        for name, parameter in self.model.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                found[from_megatron(name)] = to_numpy(gradient)
        return found

    def _after_step(self, optimizer: Any, rate: float, result: Any) -> None:
        step = self.record.step
        norm = result[1] if isinstance(result, tuple) and len(result) > 1 and result[1] is not None else float("nan")
        after, state = {}, {}
        if step in self.selection.steps:
            parameters = {from_megatron(n): p for n, p in self.model.named_parameters()}
            buffers = {from_megatron(n): b for n, b in self.model.named_buffers() if n.endswith(BUFFERS)}
            after = {kind: {name: tensor_md5(to_numpy(t)) for name, t in of.items()}
                     for kind, of in (("params", parameters), ("buffers", buffers))}  # fmt: skip
            state = _optimizer_state(self.model, optimizer) if "optimizer" in self.selection.what else {}
        self.record.end_step(rate, float(norm), self._gradients, state, after)
        self.record.optimizer = optimizer.config

    def finish(self) -> None:
        """Write the bundle and stop watching; called when the last step is done, and when the process ends."""
        if self.done:
            return
        self.done = True
        for undo in reversed(self._undo):
            undo()
        atexit.unregister(self.finish)
        if self.record is None or self.record.step == 1:
            if self.record:
                self.record.folder.discard()
            print(f"capture: no training step was seen; {self.out} was not written", file=sys.stderr)
            return
        final = {n: t for n, t in _tensors(self.model).items() if not n.endswith(BUFFERS)}
        digest = hashlib.md5(usedforsecurity=False)
        for name in sorted(final):
            digest.update(final[name].tobytes())
        path = self.record.write(self.model, torch, final, digest.hexdigest())
        for note in self.record.notes:
            print(f"capture: note: {note}", file=sys.stderr)
        print(f"capture: {self.record.step - 1} steps in {path}", file=sys.stderr)


def _subclasses(base: type) -> set[type]:
    return {c for child in base.__subclasses__() for c in ({child} | _subclasses(child))}


def _tensors(model: Any) -> dict[str, np.ndarray]:
    """Parameters, and the buffers that a checkpoint keeps."""
    kept = {name: b for name, b in model.named_buffers() if name.endswith(BUFFERS) and b is not None}
    return {from_megatron(name): to_numpy(t) for name, t in (dict(model.named_parameters()) | kept).items()}


def _leaves(optimizer: Any) -> list[Any]:
    """The optimizers that a chained one chains, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _optimizer_state(model: Any, optimizer: Any) -> dict[str, np.ndarray]:
    """m, v and master of every parameter for which this rank keeps a state of the parameter's own shape."""
    states = {id(p): s for leaf in _leaves(optimizer) if leaf.optimizer for p, s in leaf.optimizer.state.items()}
    found: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        master = getattr(parameter, "main_param", None)
        master = parameter if master is None else master
        state = states.get(id(master), {})
        for kind, tensor in (("m", state.get("exp_avg")), ("v", state.get("exp_avg_sq")), ("master", master)):
            if tensor is not None and tensor.shape == parameter.shape:
                found[f"{kind}/{from_megatron(name)}"] = to_numpy(tensor)
    return found
