"""When a run saves its state, and the thread that writes it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from paddledsv4.config import CheckpointConfig
from paddledsv4.distributed.group import Groups
from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint import shard
from paddledsv4.training.checkpoint.directory import RECORD, Directory, write_json
from paddledsv4.training.checkpoint.identity import identity, layout
from paddledsv4.training.checkpoint.record import FORMAT, digest, rank_name, seal
from paddledsv4.training.checkpoint.state import Snapshot, random_state

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer

PAUSE = 0.05  # seconds between two looks at what the other ranks have written
RUNNING, DONE, FAILED = range(3)


class Checkpoints:
    """Saves a trainer's state as ``config`` says; every rank makes one and tells it of every step.

    Args:
        base: the step that the run resumed from, if from a checkpoint in the same folder.

    Raises:
        UserError: the folder holds checkpoints of another run, or cannot be written.
    """

    def __init__(self, config: CheckpointConfig, groups: Groups, base: int | None = None):
        self.config, self.groups, self.base = config, groups, base
        self.directory = Directory(Path(config.dir))
        self.steps_here, self.saved = 0, base
        self._snapshot: Snapshot | None = None
        self._arrays: list[np.ndarray] = []
        self._writing: futures.Future | None = None
        self._abandoned = threading.Event()
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        if groups.world.rank == 0:
            self._claim()
        groups.world.barrier()

    def _claim(self) -> None:
        steps = self.directory.complete()
        if steps and self.base not in steps:
            raise UserError(
                f"{self.directory.path} holds {self.directory.name(steps[-1])} of another run: go on from it with "
                "--resume auto, or choose another --out or --save"
            )
        try:
            self.directory.path.mkdir(parents=True, exist_ok=True)
            self.directory.sweep()
        except OSError as error:
            raise UserError(f"{self.directory.path}: cannot be written ({error.strerror})") from None

    def saving(self, trainer: Trainer, steps: int, stop: Callable[[], bool] = lambda: False) -> Iterator[StepResult]:
        """``trainer.train(steps)`` that saves: after whoever takes the results has dealt with the step's.

        ``stop`` is asked before the first step and after each, on all ranks alike; True ends the run there.
        """
        if stop():
            return
        for result in trainer.train(steps):
            yield result
            stopped = stop()
            self.after_step(trainer, last=result.step == steps, stopped=stopped)
            if stopped:
                return

    def after_step(self, trainer: Trainer, last: bool = False, stopped: bool = False) -> None:
        """Save if it is time to. Whatever is being written is waited for where the run ends.

        ``last``: the run is finished, which is saved if ``save_interval`` is given; ``stopped``: it ends before, which
        is always saved.

        Raises:
            UserError: a checkpoint could not be written, this one or one before.
        """
        self.steps_here += 1
        step, interval = trainer.optimizer.step_count, self.config.save_interval
        if self._writing and self._writing.done():
            self._writing.result()  # raises what the thread raised
        warmup = self.config.warmup_save and self.steps_here == 1
        due = interval is not None and (last or step % interval == 0)
        if (warmup or stopped or due) and step != self.saved:
            self.save(trainer, background=self.config.asynchronous and not warmup)
        if last or stopped:
            self.wait()

    def save(self, trainer: Trainer, background: bool) -> None:
        """Write the state, or, in the background, copy it and let the thread write.

        Raises:
            UserError: there is no optimizer state yet, or the checkpoint before could not be written.
        """
        step = trainer.optimizer.step_count
        if step < 1:
            raise UserError("a checkpoint cannot be saved before the first step: there is no optimizer state yet")
        self.wait()
        world = self.groups.world
        part = self.directory.part(step)
        if world.rank == 0:
            self._or_user_error(step, lambda: self.directory.begin(step))
        world.barrier()
        self._snapshot = self._snapshot or Snapshot(trainer)
        self._arrays = self._snapshot.take(copy=background)
        record, own = self._record(trainer), {"random": random_state()}
        self._writing = self._thread.submit(self._or_user_error, step, lambda: self._write(part, own, record, step))
        self.saved = step
        if not background:
            self.wait()

    def _record(self, trainer: Trainer) -> dict[str, Any]:
        world, step = self.groups.world.size, trainer.optimizer.step_count
        return {
            "format": FORMAT, "step": step, "ranks": world, "rows_seen": trainer.rows_seen(step),
            "layout": layout(trainer.parallel, trainer.train_config), "fingerprint": trainer.policy.fingerprint,
            "run": identity(trainer),
        }  # fmt: skip

    # ---- in the thread: no collectives, nothing of Paddle ----------------------------------------------------------

    def _or_user_error(self, step: int, action) -> None:
        part = self.directory.part(step)
        try:
            action()
        except BaseException as error:
            if self.groups.world.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"{part}: cannot be written ({error.strerror or error}), so there is no checkpoint of step {step}"
                + self.directory.offer(step)
            ) from None

    def _write(self, part: Path, own: dict[str, Any], record: dict[str, Any], step: int) -> None:
        name = rank_name(self.groups.world.rank)
        own |= shard.write(part / f"{name}.safetensors", self._snapshot.pieces, self._arrays)
        write_json(part / f"{name}.json", own)  # its name says that this rank is done
        if self.groups.world.rank == 0:
            record["files"] = self._all_written(part, record["ranks"])
            write_json(part / RECORD, seal(record), indent=1)
            before = self.directory.publish(step, self.base)
            self.base = step
            self.directory.retain(step, before, self.config.save_retain_interval)

    def _all_written(self, part: Path, ranks: int) -> dict[str, Any]:
        """File -> MD5, once all ranks have written theirs; a rank's JSON comes last and knows the other file's."""
        files = [part / f"{rank_name(rank)}.json" for rank in range(ranks)]
        while missing := [file for file in files if not file.exists()]:
            if self._abandoned.wait(PAUSE):
                raise UserError(f"{missing[0]}: was not written")
        listed = {}
        for data in (file.read_bytes() for file in files):
            values = json.loads(data)
            listed |= {Path(values["file"]).with_suffix(".json").name: digest(data), values["file"]: values["md5"]}
        return listed

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Return when the checkpoint that is being written is complete, on all ranks.

        Ranks ask each other again and again, in short collectives, so that a slow disk is not taken for a hang.

        Raises:
            UserError: on every rank, if one could not write.
        """
        if self._writing is None:
            return
        if self.groups.world.size == 1:
            futures.wait([self._writing])
        while RUNNING in (states := self._states()) and FAILED not in states:
            time.sleep(PAUSE)
        if states[self.groups.world.rank] == FAILED:
            self._writing.result()
        if FAILED in states:
            self._abandoned.set()
            futures.wait([self._writing])
            raise UserError(f"rank {states.index(FAILED)} could not write its part of a checkpoint; see its log")
        self._writing, self._arrays = None, []

    def _states(self) -> list[int]:
        done = self._writing.done()
        own = FAILED if done and self._writing.exception() else DONE if done else RUNNING
        return self.groups.world.all_gather(paddle.to_tensor([own])).tolist()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Nothing is cut short: the thread ends what it writes. Without the other ranks, if this one failed."""
        if kind is None:
            self.wait()
        elif self.groups.world.size > 1:
            self._abandoned.set()
        self._thread.shutdown(wait=True)
