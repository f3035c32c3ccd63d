"""Adapters in files as peft has them: adapter_config.json and adapter_model.safetensors, and nothing of the base model.

A tensor is called ``base_model.model.PATH.lora_A.weight``, PATH being that of the layer under our names.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from paddledsv4.config.files import read_mapping
from paddledsv4.config.lora import GROUPED, LoraConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.errors import UserError
from paddledsv4.sft.lora import adapters
from paddledsv4.weights.names import expert_index, with_expert

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PARTS = "base_model.model.", ("lora_A", "lora_B")
# What peft can ask for and this cannot: key -> the values that ask for nothing.
PLAIN = {
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (None, False), "use_dora": (None, False),
    "fan_in_fan_out": (None, False), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "modules_to_save": (None, []), "layers_to_transform": (None,), "target_parameters": (None, []),
}  # fmt: skip


def key(path: str, part: str) -> str:
    """The name of a tensor in the file."""
    return f"{PREFIX}{path}.{part}.weight"


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds: the configuration and the tensors by their names there."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Both files.

        Raises:
            UserError: they cannot be read, or ask for more than plain LoRA.
        """
        values = read_mapping(folder / CONFIG)
        for name, plain in PLAIN.items():
            if name in values and values[name] not in plain:
                raise UserError(f"{folder / CONFIG}: {name} = {values[name]!r} is not supported; only plain LoRA is")
        known = {name: value for name, value in values.items() if name in LoraConfig.model_fields}
        config = LoraConfig.from_dict(known, where=str(folder / CONFIG))
        try:
            return cls(folder, config, load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(f"{folder / WEIGHTS}: cannot be read ({error})") from None

    def delta(self, path: str) -> np.ndarray | None:
        """What the adapter of a layer adds to its weight, [out, in] float32; None: it has none."""
        a, b = (self.tensors.get(key(path, part)) for part in PARTS)
        if a is None or b is None:
            return None
        return product(a, b, self.config, path)


def product(a: np.ndarray, b: np.ndarray, config: LoraConfig, path: str) -> np.ndarray:
    """scale B A in float32 or wider, group by group: A [groups * r, in], B [groups * out, r] -> [groups * out, in].

    Raises:
        UserError: the two do not fit together.
    """
    groups = a.shape[0] // config.r if path.endswith(GROUPED) else 1
    if a.shape[0] != groups * config.r or b.shape[1] != config.r or b.shape[0] % groups:
        raise UserError(f"adapter: {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)} with r = {config.r}")
    a, b = a.reshape(groups, config.r, -1), b.reshape(groups, -1, config.r)
    return (np.matmul(b, a) * a.dtype.type(config.scale)).reshape(-1, a.shape[-1])


def adapter_state(model: nn.Layer, groups: Groups = ALONE) -> dict[str, np.ndarray]:
    """Name in the file -> numbers, of all ranks' experts; every rank calls it and has everything."""
    state = {}
    for path, adapter in adapters(model).items():
        index = expert_index(f"{path}.")
        for part in PARTS:
            tensor = getattr(adapter, part).detach()
            if index is None or groups.expert.size == 1:
                state[key(path, part)] = tensor.numpy()
                continue
            pairs = groups.expert.all_gather(tensor.unsqueeze(0)).numpy()
            experts = groups.expert.all_gather(paddle.to_tensor([index])).tolist()
            state |= {key(with_expert(path, e), part): pair for e, pair in zip(experts, pairs, strict=True)}
    return state


def save_adapter(
    model: nn.Layer, config: LoraConfig, folder: Path, groups: Groups = ALONE, base: str | None = None
) -> None:
    """Write both files, on rank 0; all ranks call it. ``base``: where the weights of the base model are.

    Raises:
        UserError: they cannot be written. What was there is there still.
    """
    state = adapter_state(model, groups)
    if groups.world.rank:
        return
    targets = config.target_modules
    described: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    files = {WEIGHTS: save(state, {"format": "pt"}), CONFIG: (json.dumps(described, indent=2) + "\n").encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / f"{name}.part").write_bytes(data)
        for name in files:
            os.replace(folder / f"{name}.part", folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def load_adapter(model: nn.Layer, folder: Path) -> None:
    """Fill the adapters of a model, to which they are attached, from a folder. Nothing is copied unless all fits.

    Experts of other ranks are left in the file.

    Raises:
        UserError: missing, extra or misshapen tensors, or another ``r`` or ``lora_alpha``.
    """
    saved, attached = SavedAdapter.read(folder), adapters(model)
    wanted = {key(path, part): getattr(adapter, part) for path, adapter in attached.items() for part in PARTS}
    here = {expert_index(name) for name in wanted}
    extra = [n for n in saved.tensors if n not in wanted and (expert_index(n) is None or expert_index(n) in here)]
    missing = [name for name in wanted if name not in saved.tensors]
    if missing or extra:
        what = f"lacks {missing[0]}, which this model has" if missing else f"has {extra[0]}, which no layer has"
        raise UserError(f"{folder / WEIGHTS}: {what}; lora.target_modules must be the same")
    for name, tensor in wanted.items():
        if list(saved.tensors[name].shape) != list(tensor.shape):
            shapes = f"{list(saved.tensors[name].shape)}, this model's has {list(tensor.shape)}"
            raise UserError(f"{folder / WEIGHTS}: {name} has shape {shapes}; lora.r must be the same")
    if any(adapter.scale != saved.config.scale for adapter in attached.values()):
        raise UserError(f"{folder / CONFIG}: lora_alpha / r is {saved.config.scale:g}, the model was given another")
    for name, tensor in wanted.items():
        tensor.set_value(saved.tensors[name].astype(tensor.numpy().dtype))
