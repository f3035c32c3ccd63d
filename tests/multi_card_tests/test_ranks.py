"""Collectives, layouts and refusals, checked inside 2, 4 and 8 processes; one launch for all checks of a size."""

import ast
import json
from pathlib import Path

import pytest
from ranks import HERE, run_ranks

CHECKS = [
    node.name
    for file in ("jobs.py", "context_checks.py", "lora_checks.py", "metrics_checks.py", "tensor_checks.py")
    for node in ast.parse((HERE / file).read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
OF_FOUR = {  # what two ranks cannot show: groups that are not the world, uneven exchanges, layouts of two axes
    "check_all_reduce", "check_gather_scatter_broadcast", "check_all_to_all_is_uneven", "check_gradients",
    "check_groups", "check_redistribute", "check_expert_parallel_is_the_same_model", "check_mappings",
    "check_vocab_parallel_cross_entropy", "check_tensor_and_context_parallel_together_are_the_same_model",
    "check_initial_weights_are_the_same_on_any_layout",
}  # fmt: skip
LONG = {"check_tensor_parallel_losses_of_20_steps"}
assert OF_FOUR | LONG <= set(CHECKS)


def _slow(count: int, name: str) -> bool:
    return count > 4 or name in LONG or (count == 4 and name not in OF_FOUR)


CASES = [
    pytest.param(count, name, marks=[pytest.mark.slow] if _slow(count, name) else [])
    for count in (2, 4, 8)
    for name in CHECKS
]


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """ranks -> the outcomes that every rank wrote for the checks of this session; started when first asked for."""
    found: dict[int, list[dict]] = {}
    here = [item.callspec.params for item in request.session.items if item.originalname == "test_in_processes"]

    def of(count: int) -> list[dict]:
        if count not in found:
            file = tmp_path_factory.mktemp(f"ranks{count}") / "outcome"
            found[count] = []  # a launch that failed is not tried again by every check
            names = [case["name"] for case in here if case["count"] == count]
            ended = run_ranks(count, "checks", file, *names, limit=900)  # a tenth of that, if the machine is not busy
            assert all(e.code == 0 for e in ended), [e.errors[-2000:] for e in ended]
            found[count] = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(count)]
        assert found[count], "the ranks failed, see the first check"
        return found[count]

    return of


@pytest.mark.parametrize(("count", "name"), CASES)
def test_in_processes(outcomes, count, name):
    for rank, outcome in enumerate(outcomes(count)):
        if outcome[name].startswith("skipped"):
            pytest.skip(outcome[name])
        assert outcome[name] == "ok", f"rank {rank}: {outcome[name]}"
