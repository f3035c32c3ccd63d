"""A run that was stopped and resumed is the run that was not, bit for bit; and what makes it not so is seen."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import noise, numbers, small, state_bytes, train
from layouts import configs

from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import installed
from paddledsv4.training import trainer as trainer_module
from paddledsv4.training.checkpoint import resume as resume_module
from paddledsv4.training.checkpoint import state as state_module
from paddledsv4.training.checkpoint.directory import Directory

needs_torch = pytest.mark.skipif(not installed("torch"), reason="needs paddledsv4[torch]")


def case(preset: str, precision: str, half: int):
    slow = half == 5 and (preset, precision) != ("paddle", "fp32")
    marks = [needs_torch] * (preset == "torch") + [pytest.mark.slow] * slow
    return pytest.param(preset, precision, half, marks=marks)


@pytest.mark.parametrize(
    ("preset", "precision", "half"),
    [
        case(preset, precision, half)
        for preset in ("paddle", "torch") for precision in ("fp32", "bf16") for half in (1, 5)
    ],
)
def test_ten_steps_are_five_and_five(tmp_path, preset, precision, half):
    steps = {"steps": 2 * half}
    straight = small(preset, precision, **steps)
    whole, _ = train(straight)
    first, _ = train(
        small(preset, precision, **steps), tmp_path, stop=half, save_interval=half, **{"async": precision == "bf16"}
    )
    resumed = small(preset, precision, **steps)
    rest, notes = train(resumed, tmp_path, "auto", save_interval=half)
    assert numbers(first + rest) == numbers(whole) and len(first) == len(rest) == half
    assert state_bytes(resumed) == state_bytes(straight)
    assert notes == [f"resumed after step {half} from {tmp_path / Directory.name(half)}"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps without a stop, and a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("saved")
    straight = small(steps=3)
    random.seed(1), np.random.seed(1)
    with noise(straight):
        results, _ = train(straight)
    random.seed(1), np.random.seed(1)
    first = small(steps=3)
    with noise(first):
        train(first, folder, stop=2, save_interval=2)
    return SimpleNamespace(folder=folder, last=numbers(results[-1:]), state=state_bytes(straight))


def goes_on_alike(saved) -> bool:
    runner = small(steps=3)
    random.seed(9), np.random.seed(9)
    with noise(runner):
        results, _ = train(runner, source=str(saved.folder))
    return numbers(results) == saved.last and state_bytes(runner) == saved.state


def test_random_numbers_go_on(saved):
    assert goes_on_alike(saved)


class Everything(set):
    """Lacks nothing and holds nothing more, so that what a plant forgets is no error at once."""

    def __rsub__(self, names):
        return set()


EVERYTHING = Everything()


def forgetting(kind):
    """The tensors of a trainer without those whose names contain ``kind``."""
    original = state_module.state
    return lambda trainer: (item for item in original(trainer) if kind not in item[0].name)


def position(shift):
    original = trainer_module.Trainer.go_on_after
    return lambda self, step, rows: original(self, step, rows + shift)


PLANTS = {
    "first moments not restored": (resume_module, "state", forgetting("m/")),
    "second moments not restored": (resume_module, "state", forgetting("v/")),
    "expert bias not restored": (resume_module, "state", forgetting("expert_bias")),
    "parameters not restored": (resume_module, "state", forgetting("model/embedding")),
    "data position off by one": (trainer_module.Trainer, "go_on_after", position(1)),
    "step off by one": (trainer_module.Trainer, "go_on_after",
                        lambda self, step, rows: setattr(self.optimizer, "step_count", step + 1)),
    "random state not restored": (resume_module, "set_random_state", lambda saved: None),
    "Paddle's generator left alone": (trainer_module.paddle, "seed", lambda seed: None),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTS)
def test_planted_bugs_are_seen(saved, monkeypatch, bug):
    owner, name, plant = PLANTS[bug]
    monkeypatch.setattr(owner, name, plant)
    monkeypatch.setattr(resume_module._Tensors, "names", EVERYTHING)
    assert not goes_on_alike(saved)


def test_masters_are_restored(tmp_path, monkeypatch):
    """Rounded to bfloat16 and back, they would lose what is below its precision."""
    train(small(precision="bf16", steps=1), tmp_path)
    first, second = small(precision="bf16", steps=1), small(precision="bf16", steps=1)
    train(first, source=str(tmp_path))
    monkeypatch.setattr(resume_module, "state", forgetting("master/"))
    monkeypatch.setattr(resume_module._Tensors, "names", EVERYTHING)
    train(second, source=str(tmp_path))
    right, wrong = state_bytes(first), state_bytes(second)
    assert {name.split("/")[0] for name in right if right[name] != wrong[name]} == {"master"}


# ---- another run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "says"),
    [
        ("plain", {}, "numerics.fingerprint ("),
        ("plain", {}, "numerics.compress (paddle saved, plain here)"),
        ("paddle", {"clip_grad_norm": 2.0}, "training.clip_grad_norm (1.0 saved, 2.0 here)"),
        ("paddle", {"sequence_length": 64}, "training.sequence_length (32 saved, 64 here)"),
        ("paddle", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps x data (1 saved, 2 here)"),
    ],
)
def test_another_run_is_refused(saved, preset, changes, says):
    with pytest.raises(UserError) as refused:
        train(small(preset, steps=3, **changes), source=str(saved.folder))
    assert says in str(refused.value) and "--force" in str(refused.value)


def test_force_goes_on_where_the_tokens_were(saved):
    """With twice the rows a step, data still goes on after the two rows that were seen."""
    runner = small("plain", steps=3, gradient_accumulation_steps=2)
    results, notes = train(runner, source=str(saved.folder), force=True)
    assert [r.step for r in results] == [3] and runner.rows_seen(3) == 4
    assert notes[1].startswith("forced, although it differs: ") and "gradient_accumulation_steps x data" in notes[1]


def test_more_steps_are_no_other_run_unless_the_schedule_counts_them(saved):
    assert len(train(small(steps=4), source=str(saved.folder))[0]) == 2
    optimizer = configs()[1].optimizer.replace(schedule="cosine").model_dump()
    with pytest.raises(UserError, match="training.steps"):
        train(small(steps=4, optimizer=optimizer), source=str(saved.folder))


def test_another_precision_is_refused_even_by_force(saved):
    with pytest.raises(UserError, match="training.precision"):
        train(small(precision="bf16", steps=3), source=str(saved.folder))
    with pytest.raises(UserError, match="lacks master/"):
        train(small(precision="bf16", steps=3), source=str(saved.folder), force=True)


def test_nothing_left_to_do_is_said(saved):
    results, notes = train(small(steps=2), source=str(saved.folder))
    assert not results and notes[-1] == "nothing is left to do: the run ends with step 2"
