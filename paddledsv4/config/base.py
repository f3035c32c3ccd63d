"""The base of every configuration: frozen, strict about types, and one sentence per mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from paddledsv4.errors import UserError, shown

# pydantic's error type -> what is legal, filled with the error's context
LEGAL = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
}


class StrictConfig(BaseModel):
    """A frozen pydantic model whose validation errors are :class:`UserError`, never a pydantic dump."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    SECTION: ClassVar[str] = ""  # prefix of the field names in messages, such as "rope_scaling."

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, values: Any, handler) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            # a misspelt key explains the missing one, so it comes first
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            raise UserError(cls._explain(first)) from None

    @classmethod
    def _explain(cls, error: Mapping[str, Any]) -> str:
        path = ".".join(str(part) for part in error["loc"])
        field = f"{cls.SECTION}{path}" if path else cls.SECTION.rstrip(".") or cls.__name__
        if error["type"] == "missing":
            return f"{field} is missing"
        if error["type"] == "extra_forbidden":
            return f"{field} is not a known key{did_you_mean(path, cls.model_fields)}"
        legal = LEGAL.get(error["type"])
        legal = legal.format(**error.get("ctx", {})) if legal else error["msg"]
        return f"{field} = {shown(error['input'])}: {legal}"

    def reject(self, field: str, legal: str) -> None:
        """Refuse the value of ``field``.

        Raises:
            UserError: always; it names the field, its value and what is ``legal``.
        """
        raise UserError(f"{self.SECTION}{field} = {shown(getattr(self, field))}: {legal}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Build from parsed JSON or YAML; ``where`` (usually a file name) opens every message.

        Raises:
            UserError: one sentence about the first mistake found.
        """
        try:
            return cls.model_validate(values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate(self.model_dump() | changes)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` when some known name is close to ``word``, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
