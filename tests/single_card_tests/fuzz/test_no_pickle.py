"""Nothing that is read can run code: a pickle planted in every kind of file stays asleep, and is refused."""

import ast
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import small, train
from fuzzing import Pickled, refusal
from safetensors.numpy import save_file

from align.bundle import load_bundle
from paddledsv4.config import ModelConfig, Recipe
from paddledsv4.sft.adapter import SavedAdapter
from paddledsv4.sft.rows import RowFile
from paddledsv4.sft.tokenizer import ChatTokenizer
from paddledsv4.training.data import load_tokens
from paddledsv4.training.run_directory import read_run
from paddledsv4.weights.files import read_folder

ROOT = Path(__file__).parents[3]
MODEL = ModelConfig.from_file(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


def planted(mark: Path) -> bytes:
    return pickle.dumps({"model": Pickled(mark), "added_tokens": Pickled(mark)})


def torch_file(mark: Path, path: Path) -> None:
    """As torch and Paddle write their files: a zip with a pickle, or the pickle itself."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", planted(mark))
        archive.writestr("archive/version", "3\n")


def resumed(folder: Path, name: str, data: bytes) -> str | None:
    runner = small(steps=1)
    train(runner, folder, save_interval=1)
    (folder / "iter_0000001" / name).write_bytes(data)
    return refusal(train, runner, source=str(folder))


def adapter(folder: Path, data: bytes) -> str | None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (folder / "adapter_model.safetensors").write_bytes(data)
    return refusal(SavedAdapter.read, folder)


READERS = {
    "tokens.npy": lambda path: refusal(load_tokens, path, 4, 100),
    "recipe.yaml": lambda path: refusal(Recipe.from_file, path),
    "config.json": lambda path: refusal(ModelConfig.from_file, path),
    "run.json": lambda path: refusal(read_run, path.parent),
    "model.safetensors": lambda path: refusal(read_folder, path),
    "model.safetensors.index.json": lambda path: refusal(read_folder, path.parent),
    "adapter_model.safetensors": lambda path: adapter(path.parent, path.read_bytes()),
    "tokenizer.json": lambda path: refusal(ChatTokenizer, path),
    "rows.jsonl": lambda path: refusal(_first_row, path),
    "rows.parquet": lambda path: refusal(_first_row, path),
    "weights.pdparams": lambda path: refusal(read_folder, path),
    "model.pt": lambda path: refusal(read_folder, path),
}  # fmt: skip


def _first_row(path: Path) -> None:
    from paddledsv4.errors import UserError
    from paddledsv4.sft.rows import InvalidRow, conversation

    for row in RowFile(path):
        try:
            conversation(row.payload)
        except InvalidRow as error:
            raise UserError(str(error)) from None


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", READERS)
def test_planted(tmp_path, mark, name, zipped):
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers", reason="needs paddledsv4[sft]")
    path = tmp_path / name
    path.write_bytes(planted(mark))
    if zipped:
        torch_file(mark, path)
    assert READERS[name](path)
    assert not mark.exists()


def test_object_arrays(tmp_path, mark):
    np.save(tmp_path / "t.npy", np.array([[Pickled(mark)] * 5], dtype=object), allow_pickle=True)
    assert "is not a readable .npy file" in refusal(load_tokens, tmp_path / "t.npy", 4, 100)
    bundle = shutil.copytree(ROOT / "align" / "data" / "tiny-fp32", tmp_path / "bundle")
    shutil.copy(tmp_path / "t.npy", bundle / "tokens.npy")
    assert "no .npy file" in refusal(lambda: load_bundle(bundle).tokens())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["checkpoint.json", "rank_00000.json", "rank_00000.safetensors"])
def test_checkpoints(tmp_path, mark, name):
    assert resumed(tmp_path / "saved", name, planted(mark))
    assert not mark.exists()


TAGS = [
    "!!python/object/apply:os.system ['touch MARK']", "!!python/object/new:os.system ['touch MARK']",
    "!!python/name:os.system", "!!python/module:os", "!!python/object:pathlib.Path {}",
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags(tmp_path, mark, tag):
    for text in (f"model: {tag}\n", f"{tag}\n", f"model: {{vocab_size: {tag} }}\n"):
        (tmp_path / "recipe.yaml").write_text(text.replace("MARK", str(mark)))
        assert "is not YAML: could not determine a constructor" in refusal(Recipe.from_file, tmp_path / "recipe.yaml")
    assert not mark.exists()


def test_the_plant_works(mark):
    """What the files hold does run where somebody unpickles it."""
    pickle.loads(planted(mark))
    assert mark.exists()


def test_metadata_is_text(tmp_path, mark):
    save_file({"a": np.zeros(2)}, tmp_path / "m.safetensors", {"pickle": planted(mark).hex()})
    assert set(read_folder(tmp_path / "m.safetensors")) == {"a"} and not mark.exists()


FORBIDDEN = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("paddle", "load"), ("torch", "load"),
    ("yaml", "load_all"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("joblib", "load"), ("marshal", "loads"),
    ("shelve", "open"), ("dill", "loads"), ("cloudpickle", "loads"),
}  # fmt: skip


def test_no_module_unpickles():
    """Every call in the sources: no pickle by any name, numpy with allow_pickle=False, yaml with the safe loader."""
    found = []
    for path in (p for name in ("paddledsv4", "align", "benchmarks") for p in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path}: imports {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "joblib")]
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, keywords = getattr(node.func.value, "id", None), {k.arg: k.value for k in node.keywords}
            if (owner, node.func.attr) in FORBIDDEN:
                found.append(f"{path}:{node.lineno}: {owner}.{node.func.attr}")
            if (owner, node.func.attr) == ("np", "load") and getattr(keywords.get("allow_pickle"), "value", 1):
                found.append(f"{path}:{node.lineno}: np.load without allow_pickle=False")
            if (owner, node.func.attr) == ("yaml", "load") and getattr(node.args[-1], "id", "") != "RecipeLoader":
                found.append(f"{path}:{node.lineno}: yaml.load")
    assert not found, found
