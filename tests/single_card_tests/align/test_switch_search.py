"""The search for a smallest set of switches, against oracles."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.bisect.search import NotExplained, ddmin, find_switches


class Oracle:
    """Answers by ``rule`` and counts the questions."""

    def __init__(self, rule):
        self.rule, self.asked = rule, 0

    def __call__(self, flipped: set[str]) -> bool:
        self.asked += 1
        return self.rule(flipped)


def names(n: int) -> list[str]:
    return [f"op{i}" for i in range(n)]


@pytest.mark.parametrize("n", [3, 4, 5, 8, 13, 25, 40, 64, 100, 1000])
def test_three_planted_switches_are_found_within_the_bound(n):
    chance, most = random.Random(n), 0
    for _ in range(100):
        planted = set(chance.sample(names(n), 3))
        oracle = Oracle(planted.issubset)
        assert find_switches(oracle, names(n)) == planted
        most = max(most, oracle.asked)
    assert most <= 4 * 3 * math.log2(n)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_any_number_of_switches_is_found(n):
    chance = random.Random(n)
    for size in range(n + 1):
        planted = set(chance.sample(names(n), size))
        oracle = Oracle(planted.issubset)
        assert find_switches(oracle, names(n)) == planted
        assert oracle.asked <= 3 * n + 4


def test_what_flips_told_saves_questions():
    planted = set(random.Random(1).sample(names(40), 20))
    oracle = Oracle(planted.issubset)
    assert find_switches(oracle, names(40), planted, set(names(40)) - planted) == planted
    assert oracle.asked == 2 + len(planted)  # all, the set, and the set without each member


def test_of_two_harmless_switches_one_may_be_needed():
    rule = lambda flipped: "op0" in flipped and ({"op5", "op9"} & flipped) != set()  # noqa: E731
    found = find_switches(Oracle(rule), names(12), {"op0"}, set(names(12)) - {"op0"})
    assert found in ({"op0", "op5"}, {"op0", "op9"})


def test_no_set_is_made_up():
    with pytest.raises(NotExplained):
        find_switches(lambda flipped: False, names(5))
    with pytest.raises(NotExplained):  # equal only if some switch is not flipped
        find_switches(lambda flipped: "op3" not in flipped, names(5))


@given(st.integers(0, 8), st.randoms(use_true_random=False), st.floats(0, 1))
def test_any_answers_end_in_a_1_minimal_set(n, chance, share):
    """Not monotone at all: every set is equal by chance."""
    answers: dict[frozenset, bool] = {frozenset(names(n)): True}
    rule = lambda flipped: answers.setdefault(frozenset(flipped), chance.random() < share)  # noqa: E731
    needed = set(chance.sample(names(n), chance.randint(0, n)))
    found = find_switches(rule, names(n), needed, set(names(n)) - needed if chance.random() < 0.5 else ())
    assert rule(found) and not any(rule(found - {switch}) for switch in found)


def test_ddmin_needs_no_monotone_answers():
    """Flipping op2 alone spoils what op1 cures; op4 cures it again. Both or neither of them will do."""
    rule = lambda flipped: "op1" in flipped and ("op2" in flipped) == ("op4" in flipped)  # noqa: E731
    sets = ({"op1"}, {"op1", "op2", "op4"})
    assert find_switches(rule, names(8)) in sets and ddmin(lambda f: rule(set(f)), names(8)) in sets
