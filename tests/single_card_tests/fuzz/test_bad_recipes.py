"""Recipes, model configurations and command lines with anything in them: read, or refused in one line."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import yaml
from fuzzing import EXAMPLES, VALUES, change, damage, refusal, search
from hypothesis import strategies as st

from paddledsv4 import cli
from paddledsv4.commands import sft
from paddledsv4.config import ModelConfig, Recipe
from paddledsv4.config.files import read_mapping
from paddledsv4.sft.recipe import SftRecipe

ROOT = Path(__file__).parents[3]
RECIPES = {"tiny.yaml": Recipe, "sft-tiny.yaml": SftRecipe, "sft-flash-lora-mxfp4.yaml": SftRecipe}
names = st.sampled_from(list(RECIPES))


@EXAMPLES
def test_spoilt_text(tmp_path, examples):
    def check(name, spoil):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(spoil((ROOT / "configs" / name).read_bytes()))
        refusal(RECIPES[name].from_file, path)

    search(examples, check, names, damage())


@EXAMPLES
def test_strange_values(tmp_path, examples):
    """In yaml, and in the config.json of a model."""
    whole = {name: read_mapping(ROOT / "configs" / name) for name in RECIPES}

    def check(name, spoil):
        values = spoil(whole[name])
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        refusal(RECIPES[name].from_file, path)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(values.get("model")))
        refusal(ModelConfig.from_file, config)

    search(examples, check, names, change())


@EXAMPLES
def test_any_bytes(tmp_path, examples):
    def check(data, value):
        for name in ("a.yaml", "a.json"):
            (tmp_path / name).write_bytes(data)
            refusal(Recipe.from_file, tmp_path / name)
            refusal(ModelConfig.from_file, tmp_path / name)
            (tmp_path / name).write_text(json.dumps(value))
            refusal(Recipe.from_file, tmp_path / name)
            refusal(ModelConfig.from_file, tmp_path / name)

    search(examples, check, st.binary(max_size=60), VALUES)


NASTY = {
    "a loop": "model: &m {x: *m}\n",
    "a recipe that names itself": "model: recipe.yaml\n",
    "a folder": "model: .\n",
    "deep nesting": "model: " + "[" * 400 + "\n",
    "many aliases": "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(8)) + "model: *i\n",
    "a number that is too long": f"model: {{vocab_size: {'9' * 5000}}}\n",
    "a key that is a list": "? [1, 2]\n: 3\n",
    "keys that are no texts": "1: 2\nnull: 3\nmodel: {1: 2}\n",
    "null": "model: null\n",
    "a zero byte in a path": 'model: "a\\0b"\n',
    "a long path": f"model: {'x' * 5000}\n",
    "a date": "model: 2026-01-01\n",
    "a set": "model: !!set {a, b}\n",
    "binary": "model: !!binary aGFsbG8=\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", NASTY)
def test_nasty(tmp_path, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(NASTY[kind])
    assert refusal(Recipe.from_file, path)


# ---- the command line ----------------------------------------------------------------------------------------------

WORDS = st.text(max_size=12) | st.sampled_from([
    "0", "-1", "1e9", "nan", "99999999999999999999", "auto", "torch", "swiglu=plain", "swiglu=", "=", "a:b=c",
    "decoder.*:rope=plain", "--", "--force", "\0", "/", ".", "..", "/dev/null", "/proc/self/mem",
])  # fmt: skip
OPTIONS = st.sampled_from([
    "--config", "--steps", "--out", "--run-dir", "--numerics", "--op", "--layer-op", "--save", "--save-interval",
    "--save-retain-interval", "--resume", "--data", "--json", "--force",
])  # fmt: skip


def call(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of the command line, in which nothing is trained."""
    errors = io.StringIO()
    stop = mock.Mock(return_value=None)
    with (
        redirect_stderr(errors), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended,
        mock.patch.object(cli, "pretrain", stop), mock.patch.object(sft, "fine_tune", stop),
    ):
        cli.main(arguments)
    return ended.value.code or 0, errors.getvalue()


@EXAMPLES
def test_command_lines(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)

    def check(command, pairs, trailing):
        recipe = ROOT / "configs" / ("sft-tiny.yaml" if command == "sft" else "tiny.yaml")
        words = [command, *(["--config", str(recipe)] if command != "resume" else [])]
        code, errors = call([*words, *(word for pair in pairs for word in pair), *trailing])
        assert code in (0, 2) and "Traceback" not in errors, errors
        assert code == 0 or errors

    pairs = st.lists(st.tuples(OPTIONS, WORDS), max_size=3)
    commands = st.sampled_from(["train", "sft", "info", "numerics", "resume", "unknown"])
    search(examples, check, commands, pairs, st.lists(WORDS, max_size=1))
    assert not list(tmp_path.iterdir())
