"""Steps as people write them."""

import pytest

from paddledsv4.config.steps import span_in, spans_in


@pytest.mark.parametrize(
    ("text", "spans"),
    [("1,5:8", [(1, 1), (5, 8)]), (" 1, 5 : 8 ", [(1, 1), (5, 8)]), ("5", [(5, 5)]), ("3:3,2", [(3, 3), (2, 2)])],
)
def test_lists(text, spans):
    assert spans_in(text) == spans


@pytest.mark.parametrize("text", ["", ":", "5:", "8:5", "0", "1 2", "5:8:9", "1,,2", "x", "٣", "1" * 10])
def test_what_is_no_list(text):
    assert spans_in(text) is None


def test_one_span_takes_no_spaces():
    assert span_in("5:8") == (5, 8) and span_in(" 5") is None and span_in("1,5") is None
