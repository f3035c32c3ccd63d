"""Profile some steps of this rank with ``paddle.profiler`` and leave a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import paddle
from paddle.profiler import Profiler, ProfilerTarget

from paddledsv4.config.profile import ProfileConfig
from paddledsv4.observe.ops import watch_ops
from paddledsv4.observe.profile.marks import STEP, OpMarks, mark, marked_collectives
from paddledsv4.observe.profile.trace import chrome_events, write_trace
from paddledsv4.observe.steps import StepObserver

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer


def profile_path(folder: Path, rank: int) -> Path:
    """Where the trace of a rank lies in the folder of a run."""
    return folder / "profile" / f"rank{rank}.json"


def with_profile(
    trainer: Trainer, results: Iterator[StepResult], config: ProfileConfig, folder: Path
) -> Iterator[StepResult]:
    """The same results; a rank that is chosen leaves its trace in ``folder``, the others do nothing.

    Raises:
        UserError: the run has no such rank or step.
    """
    config.check(trainer.groups.world.size, trainer.train_config.steps)
    rank = trainer.groups.world.rank
    if config.steps is None or rank not in config.ranks:
        return results
    recorder = ProfileRecorder(trainer, config, profile_path(folder, rank))
    trainer.observers.append(recorder)
    return _closed_after(results, recorder)


def _closed_after(results: Iterator[StepResult], recorder: ProfileRecorder) -> Iterator[StepResult]:
    with contextlib.closing(recorder):
        yield from results


class ProfileRecorder(StepObserver):
    """Watches the chosen steps; the trace is written after the last of them, or by :meth:`close` if that never came."""

    def __init__(self, trainer: Trainer, config: ProfileConfig, path: Path):
        self.trainer, self.path = trainer, path
        self.first, self.last = config.span
        self._marks = OpMarks()
        self._watching = contextlib.ExitStack()
        self._profiler = None
        self._step = None

    def begin_step(self, step: int) -> None:
        if not self.first <= step <= self.last:
            return
        if self._profiler is None:
            self._start()
        self._step = mark(STEP, f"step {step}")
        self._step.begin()

    def begin_microbatch(self, index: int) -> None:
        self._marks.forget()

    def end_step(self, result: StepResult) -> None:
        if self._step is not None:
            self._step.end()
            self._step = None
        if result.step == self.last:
            self.close()

    def _start(self) -> None:
        targets = [ProfilerTarget.CPU]
        if paddle.device.is_compiled_with_cuda():
            targets.append(ProfilerTarget.GPU)
        self._watching.enter_context(marked_collectives(self.trainer.groups))
        self._watching.enter_context(watch_ops(self.trainer.model, self._marks))
        self._profiler = Profiler(targets=targets, on_trace_ready=lambda profiler: None)
        self._profiler.start()

    def close(self) -> None:
        """Stop profiling, and write what there is."""
        profiler, self._profiler = self._profiler, None
        self._marks.forget()
        self._watching.close()
        if profiler is not None:
            profiler.stop()
            recorded, rank = profiler.profiler_result.get_data(), self.trainer.groups.world.rank
            write_trace(self.path, chrome_events(recorded, self._marks.inner, rank))
