"""The learning rate at every step."""

import math

import pytest

from paddledsv4.config import OptimizerConfig
from paddledsv4.training.schedule import learning_rate


def rates(total: int = 10, **fields) -> list[float]:
    config = OptimizerConfig(lr=1.0, **fields)
    return [learning_rate(config, step, total) for step in range(1, total + 3)]


def test_constant():
    assert rates() == [1.0] * 12


def test_warmup_counts_completed_steps():
    assert rates(warmup_steps=4)[:6] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_to_the_minimum_and_stays():
    values = rates(schedule="linear", min_lr=0.1)
    assert values == pytest.approx([1 - 0.09 * done for done in range(10)] + [0.1, 0.1])


def test_cosine_with_warmup():
    values = rates(schedule="cosine", warmup_steps=2)
    expected = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert values == pytest.approx([0.0, 0.5, *expected, 0.0, 0.0])
    assert values[6] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_warmup_as_long_as_the_run(schedule):
    assert rates(schedule=schedule, warmup_steps=10)[9:] == [0.9, 0.0, 0.0]
