"""Without PaddleFormers, or with one that cannot be imported, a person hears what to do."""

import importlib
import sys

import pytest

from paddledsv4.errors import UserError


def test_the_extra_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("paddledsv4.formers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "paddleformers", None)
    with pytest.raises(UserError, match=r'environment of its own: pip install "paddledsv4\[formers\]"'):
        importlib.import_module("paddledsv4.formers")
