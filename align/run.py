"""Train a bundle's model with paddledsv4 and compare every loss with the recorded one."""

from __future__ import annotations

import os
import platform
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bundle import Bundle, load_bundle
from align.compare import Comparison, compare_logs, matches
from align.launch import launch_ranks
from align.logwriter import LossLogWriter
from align.losslog import LossLog, LossSeries, loss_md5, pack
from align.progress import progress
from align.readlog import read_log
from paddledsv4.distributed.launch import Launch
from paddledsv4.errors import UserError
from paddledsv4.host import BITWISE_ENVIRONMENT, prepare_host
from paddledsv4.numerics.rules import Overrides

PRECISIONS = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class RunRequest:
    """What ``align run`` was asked for; None means the bundle's own choice."""

    bundle: str
    numerics: str | None = None
    precision: str | None = None
    steps: int | None = None
    out: Path | None = None
    overrides: Overrides = Overrides()
    launch: bool = False


def run_bundle(request: RunRequest) -> tuple[Comparison | None, Path]:
    """Train, write losses.jsonl, compare.

    A bundle of several ranks is trained by as many processes: with ``request.launch`` this one starts them, and
    without it this is one of them, started by paddle.distributed.launch.

    Returns:
        The comparison (None on ranks other than 0), and where the losses were written.

    Raises:
        UserError: the bundle is malformed, or asks for what is not supported. Nothing is written then.
    """
    bundle = load_bundle(request.bundle)
    precision = check_supported(bundle, request.steps, request.precision, request.launch)
    steps = request.steps or bundle.training.steps
    reference, state = bundle.losses(), bundle.init()
    # Kernels pick their summation order by instruction set and thread count. Both are pinned before the next
    # two imports, which load paddle.
    prepare_host(bitwise=True)
    from paddledsv4.numerics.policy import Policy
    from paddledsv4.numerics.ulps import notes as kernel_notes

    policy = Policy.from_env(request.numerics, request.overrides)
    directory = request.out or run_directory(bundle, policy, precision)
    path = directory / "losses.jsonl"
    if request.launch and bundle.parallel.world_size > 1:
        launch_ranks(request, bundle.parallel.world_size, path)
    elif not _train_here(bundle, policy, precision, steps, state, path, reference):
        return None, path
    candidate, issues = read_log(path).resolve()
    comparison = compare_logs(reference, candidate, steps, issues)
    comparison.notes += [*_environment_notes(bundle), *kernel_notes(policy)]
    return comparison, path


def run_directory(bundle: Bundle, policy: Any, precision: str) -> Path:
    """Where the results of a run go unless the user says otherwise."""
    return Path("runs") / f"{bundle.name}-{policy.label}-{precision}"


def _train_here(
    bundle: Bundle, policy: Any, precision: str, steps: int, state: dict, path: Path, reference: LossLog
) -> bool:
    """Train on this rank. Rank 0 writes the log, of all ranks; returns whether this is rank 0."""
    from paddledsv4.distributed.connect import connect
    from paddledsv4.training.trainer import Trainer

    with connect(bundle.parallel) as groups:
        trainer = Trainer(
            bundle.model, bundle.training, policy, tokens=bundle.tokens, initial_state=state, precision=precision,
            parallel=bundle.parallel, groups=groups,
        )
        if groups.world.rank:
            deque(trainer.train(steps=steps), maxlen=0)
            return False
        with LossLogWriter(path, header(bundle, policy, precision, steps)) as writer:
            _train(trainer, steps, writer, reference)
            if groups.world.size == 1:
                writer.final_weights(trainer.weights_md5())
        return True


def check_supported(
    bundle: Bundle, steps: int | None, precision: str | None = None, launch: bool | None = None
) -> str:
    """The precision to run in; None is the bundle's own. ``launch``: whether the bundle's ranks are to be started, None
    where only one card is possible.

    Raises:
        UserError: the bundle was recorded on several ranks and this is one, or has not so many steps; or an unknown
            precision.
    """
    if bundle.parallel.world_size > 1 and not launch and Launch.from_env().world_size == 1:
        advice = "this command looks at one card" if launch is None else "add --launch"
        raise UserError(f"bundle {bundle.name} was recorded on {bundle.parallel.world_size} ranks; {advice}")
    if steps is not None and not 1 <= steps <= bundle.training.steps:
        raise UserError(f"--steps {steps}: bundle {bundle.name} records steps 1 to {bundle.training.steps}")
    precision = precision or bundle.training.precision
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    return precision


def _train(trainer: Any, steps: int, writer: LossLogWriter, reference: LossLog) -> None:
    """Consume the trainer, writing each step as it comes."""
    tally = Tally(reference)
    with progress(steps) as bar:
        for result in trainer.train(steps=steps):
            for loss in result.losses:
                writer.losses(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
                tally.add(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
            writer.grad_norm(result.step, result.grad_norm)
            last = result.losses[-1].main if result.losses else float("nan")
            bar.step(
                result.step, last, result.tokens / max(result.seconds, 1e-9), tally.matched, tally.compared
            )


class Tally:
    """Matches so far, main and MTP together, for the eye of whoever watches the run."""

    def __init__(self, reference: LossLog) -> None:
        self.reference = reference
        self.matched = self.compared = 0

    def add(self, step: int, microbatch: int, rank: int, main: float, mtp: float | None) -> None:
        """Count one microbatch."""
        key = pack(step, microbatch, rank)
        for series, value in ((self.reference.main, main), (self.reference.mtp, mtp)):
            index = int(np.searchsorted(series.keys, key))
            if value is None or index == len(series) or series.keys[index] != key:
                continue
            md5 = np.frombuffer(bytes.fromhex(loss_md5(value)), np.uint64).reshape(1, 2)
            mine = LossSeries(np.array([key]), np.array([value], np.float64), md5)
            self.compared += 1
            self.matched += int(matches(series.take(slice(index, index + 1)), mine)[0])


def header(bundle: Bundle, policy: Any, precision: str, steps: int) -> dict[str, Any]:
    """What the first line of the log says about the run."""
    import paddle

    return {
        "bundle": bundle.name,
        "bundle_path": str(bundle.path.resolve()),
        "steps": steps,
        "precision": precision,
        "numerics": policy.label,
        "policy_fingerprint": policy.fingerprint,
        "policy": dict(policy.describe()),
        "paddle": paddle.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "environment": {name: os.environ.get(name) for name in BITWISE_ENVIRONMENT},
    }


def _environment_notes(bundle: Bundle) -> list[str]:
    recorded = bundle.source.get("environment", {})
    recorded = recorded if isinstance(recorded, dict) else {}
    return [
        f"{name} is {os.environ.get(name)!r} here, {recorded[name]!r} in the bundle: bits may differ"
        for name in BITWISE_ENVIRONMENT
        if name in recorded and recorded[name] != os.environ.get(name)
    ]
