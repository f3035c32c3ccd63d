"""The one exception that is meant for a person, and how it shows values."""

from __future__ import annotations

import reprlib
from typing import Any


class UserError(Exception):
    """A mistake in what the user asked for: one sentence with the field, the value and what is legal.

    The command line prints ``error: <message>`` and exits 2; anything else that escapes is a bug and keeps
    its trace. Whatever words of a file or a library it quotes, it is one line.
    """

    def __str__(self) -> str:
        return " ".join(line.strip() for line in super().__str__().splitlines())


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 200, 200, 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 12


def shown(value: Any) -> str:
    """``repr`` that stays short, whatever somebody wrote into a file: a few bytes of YAML can mean a gigabyte."""
    try:
        return _REPR.repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits
        return f"a {type(value).__name__}"
