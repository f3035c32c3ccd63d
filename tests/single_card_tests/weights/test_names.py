"""The table of names against the released checkpoint's list, against our model, and against itself."""

import hashlib
import json
import math
import re
from collections import Counter

import pytest
from generated import small_config
from reference import HF_TINY, ROOT, tiny_model
from safetensors import safe_open

from paddledsv4.config import ModelConfig
from paddledsv4.info import model_info
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.names import FORMATS, atoms, from_megatron, tensors, to_megatron, traced
from paddledsv4.weights.source import listing

FLASH, PRO = (ROOT / "tests" / "data" / f"{name}_config.json" for name in ("flash", "pro"))
FIXTURE = ROOT / "tests" / "data" / "flash_tensors.json"


def lines_of(listed) -> list[str]:
    return sorted(f"{name} {' '.join(map(str, shape))} {dtype}" for name, (dtype, shape) in listed.items())


def summary(listed) -> dict:
    """MD5 over all lines, and how many tensors there are of every pattern."""
    lines = lines_of(listed)
    patterns = Counter(re.sub(r"\.\d+(?=\.)", ".*", line) for line in lines)
    return {"md5": hashlib.md5("\n".join(lines).encode()).hexdigest(), "patterns": dict(sorted(patterns.items()))}


def test_flash_is_the_released_checkpoint():
    listed = listing(ModelConfig.from_file(FLASH))
    assert len(listed) == 69_187
    assert sum(math.prod(shape) for _, shape in listed.values()) == 158_069_433_298
    assert summary(listed) == json.loads(FIXTURE.read_text())


def test_flash_tensor_by_tensor(shared):
    rows, recorded = json.loads((shared / "cases" / "dsv4_flash_tensors.json").read_text())["rows"], {}
    for row in rows:
        for layer in row["layers"] or [None]:
            for expert in range(256 if "{e}" in row["key"] else 1):
                name = row["key"].replace("{i}", str(layer)).replace("{e}", str(expert))
                recorded[name] = row["dtype"], tuple(row["shape"])
    listed = listing(ModelConfig.from_file(FLASH))
    assert listed == recorded
    assert summary(recorded) == json.loads(FIXTURE.read_text())


def test_one_wrong_shape_shows():
    listed = listing(ModelConfig.from_file(FLASH).replace(index_n_heads=32))
    assert len(listed) == 69_187 and summary(listed) != json.loads(FIXTURE.read_text())


def test_pro_by_the_same_rule():
    config = ModelConfig.from_file(PRO)
    assert len(listing(config)) == 145_116
    learned = (atom for atom in atoms(config) if not atom.name.endswith((".tid2eid", ".expert_bias")))
    assert sum(math.prod(atom.shape) for atom in learned) == model_info(config).parameters


@pytest.mark.parametrize("part", [part.name for part in model_info(ModelConfig.from_file(FLASH)).parts])
def test_parts_are_those_of_info(part):
    config = ModelConfig.from_file(FLASH)
    learned = (a for a in atoms(config) if a.part == part and not a.name.endswith((".tid2eid", ".expert_bias")))
    counted = next(known.parameters for known in model_info(config).parts if known.name == part)
    assert sum(math.prod(atom.shape) for atom in learned) == counted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_names_are_the_models(precision):
    model = tiny_model(precision=precision)
    ours, table = named_tensors(model), tensors(model.config, "paddledsv4")
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {n: t.shape for n, t in table.items()}
    narrow = "FLOAT32" if precision == "fp32" else "BFLOAT16"
    for name, tensor in ours.items():  # what the released files keep in float32 is never narrower here
        assert tensor.dtype.name == {"F32": "FLOAT32", "I64": "INT32"}.get(table[name].kind, narrow)


def test_transformers_names_are_those_of_its_weights():
    with safe_open(HF_TINY / "weights.safetensors", "numpy") as file:
        recorded = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    table = tensors(ModelConfig.from_file(HF_TINY / "config.json"), "hf")
    assert {name: tensor.shape for name, tensor in table.items()} == recorded


@pytest.mark.parametrize("format", FORMATS)
def test_every_atom_has_a_place_of_its_own(format):
    config = small_config()
    placed = [slot[:2] for atom in atoms(config) if (slot := atom.slot(format))]
    assert len(placed) == len(set(placed)) == sum(len(tensor.atoms) for tensor in tensors(config, format).values())
    missing = [atom for atom in atoms(config) if atom.slot(format) is None]
    assert {atom.part for atom in missing} == ({"multi-token prediction"} if format == "hf" else set())


def test_both_spellings_of_experts():
    ours, grouped = tensors(small_config(), "paddledsv4"), tensors(small_config(), "megatron")
    assert [from_megatron(name) for name in grouped] == list(ours)
    assert [to_megatron(name, grouped_experts=True) for name in ours] == list(grouped)


def test_traces_speak_of_layers_of_the_table():
    """Every layer that the trace watches by its parameter is one that the table knows."""
    names = set(tensors(small_config(), "paddledsv4"))
    modules = {name.rpartition(".")[0] for name in names}
    paths = {".".join(module.split(".")[:i]) for module in modules for i in range(len(module.split(".")) + 1)}
    watched = {place.layer for row in traced(4, 1) for place in (row.paddle, row.megatron) if place}
    layers = {layer for layer in watched if "layers.0" not in layer or layer.startswith("mtp")}
    kinds = ("core_attention.indexer", "core_attention.compressor")  # not in every layer
    assert {layer for layer in layers if layer not in paths and not layer.endswith(kinds)} == set()
