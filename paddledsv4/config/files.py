"""Reading JSON and YAML files, and finding the model section in each kind of file that has one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from paddledsv4.errors import UserError


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-6 as a number, as everybody expects; YAML 1.1 makes it a text."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The top-level mapping of a JSON (``*.json``) or YAML file.

    Raises:
        UserError: the file is missing, malformed or holds something other than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"
        ) from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, RecipeLoader)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    return values


def read_model_section(path: Path) -> tuple[dict[str, Any], Path]:
    """The model's keys and the file they came from.

    A ``model`` that is a text names another file, relative to this one.

    Raises:
        UserError: no such file, or no model in it.
    """
    if path.is_dir():
        found = [path / name for name in ("bundle.json", "config.json") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: has neither a bundle.json nor a config.json")
        path = found[0]
    values = read_mapping(path)
    if "model" in values:
        section = values["model"]
        if isinstance(section, str):
            return read_model_section(path.parent / section)
        if not isinstance(section, dict):
            raise UserError(f"{path}: model = {section!r}: must be a mapping or the path of a config.json")
        return section, path
    if path.suffix != ".json":
        raise UserError(f"{path}: model is missing; a recipe has a model: section")
    return values, path
