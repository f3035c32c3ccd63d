"""The sizes: exact against the published tensor table of Flash and against a real initial state."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from paddledsv4.config import ModelConfig
from paddledsv4.info import model_info

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
BUFFERS = ("tid2eid", "expert_bias")


def sizes(name: str):
    return model_info(ModelConfig.from_file(ROOT / "configs" / f"{name}.yaml"))


def test_published_totals():
    flash, pro = sizes("flash"), sizes("pro")
    assert (flash.parameters_without_mtp, flash.parameters) == (284_332_230_231, 290_942_278_866)
    assert flash.activated_parameters == pytest.approx(13e9, rel=0.03)
    assert pro.parameters == pytest.approx(1.599e12, rel=1e-3)
    assert pro.activated_parameters == pytest.approx(49e9, rel=0.01)


def test_tiny_is_the_shipped_initial_state():
    with safe_open(ROOT / "align/data/tiny-fp32/init.safetensors", "np") as state:
        shapes = {name: state.get_slice(name).get_shape() for name in state.keys()}
    learned = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS)}
    tiny = sizes("tiny")
    assert tiny.parameters == sum(learned.values())
    assert tiny.parameters_without_mtp == sum(n for name, n in learned.items() if not name.startswith("mtp"))
    assert part(tiny, "hyper-connections").parameters == sum(
        n
        for name, n in learned.items()
        if ("hyper_connection" in name or "hc_head" in name) and "mtp" not in name
    )
    assert part(tiny, "indexers").parameters == sum(
        n for name, n in learned.items() if ".indexer." in name and "mtp" not in name
    )


def part(info, name):
    return next(part for part in info.parts if part.name == name)


def test_flash_tensor_by_tensor():
    path = SHARED / "cases" / "dsv4_flash_tensors.json"
    if not path.exists():
        pytest.skip("the published tensor table is not on this machine")
    total = 0
    for row in json.loads(path.read_text())["rows"]:
        key = row["key"]
        if key.endswith((".scale", "tid2eid", "gate.bias")):
            continue
        copies = (len(row["layers"]) if "{i}" in key else 1) * (256 if "{e}" in key else 1)
        packed = 2 if row["dtype"] == "I8" else 1  # two FP4 numbers in a byte
        total += math.prod(row["shape"]) * copies * packed
    assert sizes("flash").parameters == total


def test_memory_follows_from_the_counts():
    tiny = sizes("tiny")
    assert tiny.weight_bytes(2) == 2 * tiny.parameters
    assert sum(tiny.optimizer_bytes.values()) == 16 * tiny.parameters
    logits = 512 * 2  # of the head and of one MTP layer, float32 at any precision
    assert tiny.activation_bytes_per_token(4) - tiny.activation_bytes_per_token(2) == 2 * (
        sum(part.activations for part in tiny.parts) - logits
    )


def test_activations_of_one_layer():
    """A window-only, hash-routed layer, written out from the formula."""
    from paddledsv4.info import layer_parts

    config = ModelConfig.from_file(ROOT / "configs" / "tiny.yaml")
    kept = {part.name: part.activations for part in layer_parts(config, 0)}
    assert kept["attention projections"] == 2 * 64 + 4 * 8 * 32 + 2 * 32 + 4 * 32 + 128
    assert kept["hyper-connections"] == 2 * 4 * 128 + 2 * 128
    assert kept["routed experts"] == 2 * (2 * 128 + 3 * 64)
    assert kept["compressors"] == kept["indexers"] == 0


def test_json_has_every_part():
    values = json.loads(json.dumps(sizes("flash").to_dict()))
    assert sum(part["parameters"] for part in values["parts"].values()) == values["parameters"]
