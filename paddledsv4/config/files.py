"""Reading JSON and YAML files, and finding the model section in each kind of file that has one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from paddledsv4.errors import UserError, shown


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
    except (OSError, ValueError) as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({what})") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, RecipeLoader)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as an impossible date
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    return values


def read_model_section(path: Path) -> tuple[dict[str, Any], Path]:
    """The model's keys and the file they came from.

    A ``model`` that is a text names another file, relative to this one.

    Raises:
        UserError: no such file, or no model in it.
    """
    seen: set[Path] = set()
    while True:
        path = _config_in(path)
        if path in seen:
            raise UserError(f"{path}: model names a file that names this one again")
        seen.add(path)
        values = read_mapping(path)
        if "model" not in values:
            if path.suffix != ".json":
                raise UserError(f"{path}: model is missing; a recipe has a model: section")
            return values, path
        section = values["model"]
        if isinstance(section, dict):
            return section, path
        if not isinstance(section, str):
            raise UserError(f"{path}: model = {shown(section)}: must be a mapping or the path of a config.json")
        path = path.parent / section


def _config_in(path: Path) -> Path:
    """The file that a folder means, or the file itself."""
    try:
        if not path.is_dir():
            return path
        found = [path / name for name in ("bundle.json", "config.json") if (path / name).is_file()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(f"{path}: has neither a bundle.json nor a config.json")
    return found[0]
