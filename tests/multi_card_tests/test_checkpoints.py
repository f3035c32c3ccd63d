"""A rank that cannot write its part: the run ends with one sentence, and the checkpoint before is the latest."""

import pytest
from ranks import run_ranks
from test_failures import only_error

from paddledsv4.training.checkpoint.directory import find


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("killed", "lost a rank: it died"),
        ("full", "rank 1 could not write its part of a checkpoint"),
    ],
)
def test_the_last_complete_one_stays(tmp_path, how, says):
    ended = run_ranks(2, "saving", tmp_path / how, limit=120)
    assert ended[0].code == 2 and says in only_error(ended[0].errors)
    if how == "full":
        assert "iter_0000002.part: cannot be written (No space left on device)" in only_error(ended[1].errors)
    directory, step = find(tmp_path / how)
    assert step == 1 and directory.complete() == [1]
