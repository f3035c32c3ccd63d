"""Collectives, layouts and refusals, checked inside 2, 4 and 8 processes; one launch for all checks of a size."""

import ast
import json
from pathlib import Path

import pytest
from ranks import HERE, run_ranks

NAMES = [
    node.name
    for file in ("jobs.py", "context_checks.py", "lora_checks.py", "metrics_checks.py", "tensor_checks.py")
    for node in ast.parse((HERE / file).read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """ranks -> the outcomes that every rank wrote; started when first asked for."""
    found: dict[int, list[dict]] = {}

    def of(count: int) -> list[dict]:
        if count not in found:
            file = tmp_path_factory.mktemp(f"ranks{count}") / "outcome"
            found[count] = []  # a launch that failed is not tried again by every check
            ended = run_ranks(count, "checks", file, limit=900)  # on a busy machine; it takes a tenth of that
            assert all(e.code == 0 for e in ended), [e.errors[-2000:] for e in ended]
            found[count] = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(count)]
        assert found[count], "the ranks failed, see the first check"
        return found[count]

    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_in_processes(outcomes, count, name):
    for rank, outcome in enumerate(outcomes(count)):
        if outcome[name].startswith("skipped"):
            pytest.skip(outcome[name])
        assert outcome[name] == "ok", f"rank {rank}: {outcome[name]}"
