"""Which checkpoints there are: names, intervals, retention, and what is left after a kill at any moment."""

import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from checkpoints import config, read_all, small

from paddledsv4.config import CheckpointConfig
from paddledsv4.errors import UserError
from paddledsv4.training.checkpoint import directory as directory_module
from paddledsv4.training.checkpoint.directory import Directory, find
from paddledsv4.training.checkpoint.save import Checkpoints
from paddledsv4.training.checkpoint.state import Snapshot


@pytest.fixture(scope="module")
def runner():
    """Its steps are only counted here, so that saving takes milliseconds."""
    return small()


@pytest.fixture
def folder():
    """In memory where there is such a folder: what is tested is an order, and disks take their time to sync."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


def pretend(runner, step: int) -> None:
    """Step ``step`` was made: it stands in every moment."""
    runner.optimizer.step_count = step
    for kept in runner.optimizer.states:
        kept.m.fill_(step)


def go_through(runner, steps, folder: Path, base=None, **values) -> Checkpoints:
    with Checkpoints(config(folder, **values), runner.groups, base) as checkpoints:
        for step in steps:
            pretend(runner, step)
            checkpoints.after_step(runner, last=step == steps[-1])
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def iters(*steps: int) -> list[str]:
    return [*(f"iter_{step:07d}" for step in steps), "latest"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("last", "values", "left"),
    [
        (6, {"save_interval": 2}, (2, 4, 6)),
        (7, {"save_interval": 2}, (2, 4, 6, 7)),  # the end is saved too
        (6, {"save_interval": 2, "save_retain_interval": 4}, (4, 6)),
        (9, {"save_interval": 2, "save_retain_interval": 4}, (4, 8, 9)),
        (4, {"save_interval": 2, "warmup_save": True}, (1, 2, 4)),
        (4, {"save_interval": 2, "warmup_save": True, "save_retain_interval": 2}, (2, 4)),
    ],
)
def test_megatrons_rules(runner, folder, last, values, left, background):
    go_through(runner, range(1, last + 1), folder, **values, **{"async": background})
    assert names(folder) == iters(*left)
    assert (folder / "latest").read_text() == f"iter_{last:07d}\n" and find(folder)[1] == last
    for step in left:
        assert (read_all(folder / f"iter_{step:07d}")["m/output_layer.weight"] == step).all()


def test_warmup_saves_the_first_step_of_every_process(runner, folder):
    go_through(runner, range(1, 5), folder, save_interval=4)
    go_through(runner, range(5, 8), folder, base=4, save_interval=4, warmup_save=True)
    assert names(folder) == iters(4, 5, 7)


def test_nothing_is_saved_before_the_first_step(runner, folder):
    pretend(runner, 0)
    with Checkpoints(config(folder), runner.groups) as checkpoints:
        with pytest.raises(UserError, match="before the first step"):
            checkpoints.save(runner, background=False)
    assert names(folder) == []


def test_a_symbolic_link_is_not_deleted(runner, folder):
    go_through(runner, [2], folder / "far")
    (folder / "here").mkdir()
    (folder / "here" / "iter_0000002").symlink_to(folder / "far" / "iter_0000002")
    (folder / "here" / "latest").write_text("iter_0000002\n")
    go_through(runner, [4], folder / "here", base=2, save_interval=1, save_retain_interval=4)
    assert names(folder / "here") == iters(2, 4)


def test_checkpoints_of_another_run_are_not_touched(runner, folder):
    go_through(runner, [2], folder)
    with pytest.raises(UserError, match="holds iter_0000002 of another run: go on from it with --resume auto"):
        go_through(runner, [1], folder)
    assert names(folder) == iters(2)


def test_a_run_that_goes_back_replaces_what_it_left(runner, folder):
    go_through(runner, [1, 2, 3, 4], folder, save_interval=2)
    (folder / "iter_0000004" / "mine").touch()
    go_through(runner, [3, 4], folder, base=2, save_interval=2)
    assert names(folder) == iters(2, 4) and not (folder / "iter_0000004" / "mine").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dir": "x"}, "checkpoint.save_interval = None: must be given with dir"),
        ({"dir": "x", "save_interval": 4, "save_retain_interval": 6}, "must be a multiple of save_interval (4)"),
        ({"asink": True}, "checkpoint.asink is not a known key"),
    ],
)
def test_settings(values, says):
    with pytest.raises(UserError) as refused:
        CheckpointConfig.from_dict(values)
    assert says in str(refused.value)


# ---- killed --------------------------------------------------------------------------------------------------------


def in_a_child(action) -> int:
    """Run it in a copy of this process; returns how that ended."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(60)
    return child.exitcode


def good(folder: Path, at_least: int) -> bool:
    """Whether the latest checkpoint, and every other that looks complete, is what was saved."""
    try:
        _, step = find(folder)
        tensors = [(n, read_all(folder / Directory.name(n))) for n in Directory(folder).complete()]
    except UserError:
        return False
    return step >= at_least and all((t["m/output_layer.weight"] == n).all() for n, t in tensors)


@pytest.fixture
def first_saved(runner, folder):
    """A complete checkpoint of step 2, the latest, and one of step 6 that a run to come replaces."""
    go_through(runner, [2, 6], folder / "first", save_interval=2)
    Directory(folder / "first").point(2)
    return folder / "first"


def test_sigkill_at_twenty_random_moments(runner, first_saved):
    """The child saves as fast as it can and resumes what it finds; the parent kills, more often on a busy machine."""

    def save_on():
        step = find(first_saved)[1]
        values = {"save_interval": 2, "save_retain_interval": 6, "async": True}
        go_through(runner, range(step + 1, step + 1000), first_saved, base=step, **values)

    draw, reached = random.Random(1), 2
    for kill in range(100):
        if kill >= 20 and reached > 6:
            break
        child = multiprocessing.get_context("fork").Process(target=save_on)
        child.start()
        time.sleep(draw.uniform(0.02, 0.25))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert good(first_saved, reached)
        reached = find(first_saved)[1]
    assert reached > 6
    go_through(runner, [reached + 1], first_saved, base=reached, save_interval=2)
    assert not [name for name in names(first_saved) if name.endswith(".part")]  # what was half written is swept up


def killed_before_every_change(runner, start: Path, folder: Path, publish=Directory.publish) -> bool:
    """Kill before the first, second, ... operation that changes what is on the disk; whether all was well each time."""

    def save(limit: int) -> None:
        count = 0

        def counted(operation):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count > limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*arguments, **options)

            return call

        for name in ("fsync", "rename", "replace", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        Directory.publish = publish
        go_through(runner, [6], folder, base=2, save_interval=3, save_retain_interval=3)

    for limit in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        ended = in_a_child(functools.partial(save, limit))
        if not good(folder, 6 if ended == 0 else 2):
            return False
        if ended == 0:
            assert limit > 12
            return True
    raise AssertionError("it never came to an end")


def test_sigkill_before_every_operation(runner, first_saved, folder):
    assert killed_before_every_change(runner, first_saved, folder / "again")


def latest_first(self, step, base):
    self.point(step)
    os.rename(self.part(step), self.folder(step))


def test_a_pointer_written_first_is_seen(runner, first_saved, folder):
    Directory(first_saved).delete(6)
    assert not killed_before_every_change(runner, first_saved, folder / "again", latest_first)


# ---- power cuts: what is not synced may be lost --------------------------------------------------------------------


def disk_operations(monkeypatch, action) -> list[tuple[str, str]]:
    """("sync", path) and ("rename", new path) in the order in which they happen."""
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (seen.append(("sync", os.readlink(f"/proc/self/fd/{f}"))), fsync(f)))
    for name, original in (("rename", rename), ("replace", replace)):
        def call(source, target, original=original):
            seen.append(("rename", str(target)))
            original(source, target)
        monkeypatch.setattr(os, name, call)
    action()
    return seen


def test_everything_is_on_the_disk_before_its_name(runner, folder, monkeypatch):
    seen = disk_operations(monkeypatch, lambda: go_through(runner, [5], folder))
    part, final, latest = folder / "iter_0000005.part", folder / "iter_0000005", folder / "latest"
    published, pointed = seen.index(("rename", str(final))), seen.index(("rename", str(latest)))
    for name in ("rank_00000.safetensors", "rank_00000.json.part", "checkpoint.json.part"):
        assert seen.index(("sync", str(part / name))) < published
    assert ("sync", str(part)) in seen[seen.index(("rename", str(part / "checkpoint.json"))) : published]
    assert ("sync", str(folder)) in seen[published:pointed]
    assert ("sync", str(folder)) in seen[pointed:]
    assert seen.index(("sync", f"{latest}.part")) < pointed


# ---- the disk refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full(runner, folder, background):
    """The error of the thread is raised once; what was half written goes; the last complete one stays."""
    go_through(runner, [5], folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as refused:
            go_through(runner, [10], folder, base=5, **{"async": background})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "iter_0000010.part: cannot be written (File too large), so there is no checkpoint of step 10" in str(
        refused.value
    )
    assert str(refused.value).endswith(f"--resume {folder / 'iter_0000005'}")
    assert names(folder) == iters(5)


def test_a_folder_that_cannot_be_made(runner, folder):
    (folder / "file").touch()
    with pytest.raises(UserError, match="file/x: cannot be written"):
        go_through(runner, [5], folder / "file" / "x")


def test_training_goes_on_while_the_thread_writes(runner, folder, monkeypatch):
    """What is written is the state of the saved step, though the next step has changed it meanwhile."""
    write = directory_module.write_json
    monkeypatch.setattr(
        "paddledsv4.training.checkpoint.save.write_json", lambda *a, **k: (time.sleep(0.2), write(*a, **k))
    )
    with Checkpoints(config(folder, **{"async": True}), runner.groups) as checkpoints:
        pretend(runner, 5)
        checkpoints.after_step(runner)
        pretend(runner, 6)
        assert not (folder / "latest").exists()
        checkpoints.after_step(runner)
    assert good(folder, 5) and find(folder)[1] == 5


def test_without_a_copy_it_would_be_another_step(runner, folder, monkeypatch):
    take = Snapshot.take
    monkeypatch.setattr(Snapshot, "take", lambda self, copy: take(self, False))
    original = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda self, *a: (time.sleep(0.2), original(self, *a)))
    with Checkpoints(config(folder, **{"async": True}), runner.groups) as checkpoints:
        pretend(runner, 5)
        checkpoints.after_step(runner)
        pretend(runner, 6)
    assert not good(folder, 5)


def test_the_copy_is_used_again(runner):
    """No memory is asked for after the first save."""
    snapshot = Snapshot(runner)
    first = [array.ctypes.data for array in snapshot.take(copy=True)]
    assert [array.ctypes.data for array in snapshot.take(copy=True)] == first
