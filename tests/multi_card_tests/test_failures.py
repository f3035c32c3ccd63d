"""A rank that dies, hangs or gives up: one clear error on the others, within a minute."""

import pytest
from ranks import run_ranks


def only_error(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("killed", "lost a rank: it died"),
        ("hanging", "in vain: a rank hangs or is out of step"),
        ("failing", "stopped because another rank did: rank 1: this disk is full"),
    ],
)
def test_the_others_say_so(job, says):
    ended = run_ranks(2, job, limit=90)
    assert ended[0].code == 2 and ended[0].seconds < 60
    error = only_error(ended[0].errors)
    assert says in error and error.startswith("error: rank 0: "), error
