"""What tests with random bad input share: how files are spoilt, strange values, and how many cases are tried."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddledsv4.errors import UserError

EXAMPLES = pytest.mark.parametrize(
    "examples", [pytest.param(25, id="few"), pytest.param(500, id="many", marks=pytest.mark.slow)]
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**30) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def search(examples: int, check: Callable[..., None], *strategies) -> None:
    """Call ``check`` with ``examples`` draws, the same ones every time."""
    limits = settings(
        derandomize=True, deadline=None, max_examples=examples, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    limits(given(*strategies)(check))()


@st.composite
def damage(draw) -> Callable[[bytes], bytes]:
    """A way to spoil bytes: some changed, lost, added or repeated, or the end cut off."""
    how = draw(st.sampled_from(["change", "flip", "cut", "lose", "add", "repeat"]))
    place, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 8))
    more, bit = draw(st.binary(min_size=1, max_size=8)), 1 << draw(st.integers(0, 7))

    def spoil(data: bytes) -> bytes:
        at = int(place * len(data))
        before, after = data[:at], data[at:]
        return {
            "change": before + more + after[len(more) :],
            "flip": before + bytes([b ^ bit for b in after[:1]]) + after[1:],
            "cut": before,
            "lose": before + after[size:],
            "add": before + more + after,
            "repeat": before + after[:size] + after,
        }[how]

    return spoil


@st.composite
def change(draw) -> Callable[[Any], Any]:
    """A way to spoil a tree of mappings and lists: one value replaced or removed, or a key added."""
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    place, value, key = draw(st.floats(0, 1, exclude_max=True)), draw(VALUES), draw(st.text(max_size=6))

    def spoil(tree: Any) -> Any:
        tree = copy.deepcopy(tree)
        places = list(_places(tree))
        owner, name = places[int(place * len(places))]
        if how == "replace":
            owner[name] = value
        elif how == "remove":
            del owner[name]
        elif isinstance(owner, dict):
            owner[key] = value
        else:
            owner.append(value)
        return tree

    return spoil


def _places(tree: Any):
    for name in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, name
        if isinstance(tree[name], dict | list):
            yield from _places(tree[name])


def refusal(function: Callable[..., Any], *arguments, **keywords) -> str | None:
    """What a :class:`UserError` says, which must be one line; None if there was none."""
    try:
        function(*arguments, **keywords)
    except UserError as error:
        assert str(error) and "\n" not in str(error), str(error)
        return str(error)
    return None


class Pickled:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def as_json(values: Any) -> str:
    """JSON as Python writes it, with NaN and lone surrogates."""
    return json.dumps(values)
