"""``align capture``: run a bundle's training with paddledsv4 and record it."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bundle import Bundle, load_bundle
from align.capture.kernels import kernel_fingerprint
from align.capture.selection import Selection
from align.capture.store import Folder
from align.logwriter import LossLogWriter
from align.progress import progress
from align.run import Tally, check_supported, header
from paddledsv4.errors import UserError
from paddledsv4.host import prepare_host
from paddledsv4.numerics.rules import Overrides
from paddledsv4.numerics.settings import from_environment


@dataclass(frozen=True)
class CaptureRequest:
    """What ``align capture`` was asked for."""

    bundle: str
    out: Path
    selection: Selection
    ranks: tuple[int, ...] = (0,)
    numerics: str | None = None
    overrides: Overrides = Overrides()


def capture_bundle(request: CaptureRequest) -> str:
    """Train up to the last traced step, write the bundle, and tell where it is and what capturing cost.

    Raises:
        UserError: the bundle is malformed, or something was asked for that it does not have. Nothing is written then.
    """
    bundle, selection = load_bundle(request.bundle), request.selection
    steps = max(selection.steps)
    precision = check_supported(bundle, steps)
    _check_selection(bundle, request)
    reference, state = bundle.losses(), bundle.init()
    prepare_host(bitwise=True)
    from align.capture.recorder import Recorder
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.training.trainer import Trainer

    policy = Policy.from_env(request.numerics, request.overrides)
    trainer = Trainer(bundle.model, bundle.training, policy, bundle.tokens, initial_state=state, precision=precision)
    head = header(bundle, policy, precision, steps)
    seconds: list[tuple[float, float]] = []
    with Folder(request.out) as folder, Recorder(trainer, selection, folder) as recorder:
        tally = Tally(reference)
        with LossLogWriter(folder.hidden / "losses.jsonl", head) as writer, progress(steps) as bar:
            for result in trainer.train(steps):
                recorder.end_step(result)
                spent = recorder.watch.lap()
                seconds.append((result.seconds - recorder.inside, spent))
                for loss in result.losses:
                    writer.losses(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
                    tally.add(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
                writer.grad_norm(result.step, result.grad_norm)
                speed = result.tokens / max(result.seconds, 1e-9)
                bar.step(result.step, result.losses[-1].main, speed, tally.matched, tally.compared)
            writer.final_weights(trainer.weights_md5())
        shutil.copyfile(bundle.path / "init.safetensors", folder.hidden / "init.safetensors")
        rows = steps * bundle.training.gradient_accumulation_steps * bundle.training.micro_batch_size
        np.save(folder.hidden / "tokens.npy", bundle.tokens[:rows])
        folder.json("bundle.json", _description(bundle, request, head, seconds))
    return f"bundle: {folder.path}\n{_cost(selection, seconds)}"


def _check_selection(bundle: Bundle, request: CaptureRequest) -> None:
    microbatches = bundle.training.gradient_accumulation_steps
    if max(request.selection.microbatches) >= microbatches:
        raise UserError(
            f"--microbatches {max(request.selection.microbatches)}: bundle {bundle.name} has microbatches 0 to "
            f"{microbatches - 1} in each step"
        )
    if request.ranks != (0,):
        raise UserError("--ranks: align capture trains on one rank so far, so it must be 0")


def _description(
    bundle: Bundle, request: CaptureRequest, head: dict[str, Any], seconds: list[tuple[float, float]]
) -> dict[str, Any]:
    described = json.loads((bundle.path / "bundle.json").read_text(encoding="utf-8"))
    selection = request.selection
    source = {
        "trainer": f"paddledsv4, numerics {head['numerics']} ({head['policy_fingerprint']}), paddle {head['paddle']}",
        "environment": head["environment"],
        "captured_from": bundle.name,
        "capture": {
            "steps": list(selection.steps),
            "microbatches": list(selection.microbatches),
            "names": list(selection.names),
            "what": list(selection.what),
            "step_seconds": [round(step, 4) for step, _ in seconds],
            "capture_seconds": [round(spent, 4) for _, spent in seconds],
        },
    }
    torch = sys.modules.get("torch")  # there when a policy computes with its kernels
    if torch is not None:
        source["torch"] = torch.__version__
    chosen = {name: getattr(bundle.training, name) for name in from_environment()}
    training = described["training"] | chosen | {"steps": len(seconds)}
    return described | {"name": request.out.name, "source": source | kernel_fingerprint(torch), "training": training}


def _cost(selection: Selection, seconds: list[tuple[float, float]]) -> str:
    traced = [seconds[step - 1] for step in selection.steps]
    alone, spent = (statistics.median(column) for column in zip(*traced, strict=True))
    return f"a traced step took {alone:.2f} s and capturing {spent:.2f} s more (medians of {len(traced)})"
