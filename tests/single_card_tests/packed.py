"""What tests of packed experts share: one mixture-of-experts layer, packed or not, and golden cases."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from layouts import configs
from reference import ROOT
from safetensors.paddle import load_file

from paddledsv4.moe.mxfp4 import packed_weights
from paddledsv4.numerics.policy import AUTO, PRESETS, Policy
from paddledsv4.ops.precision import widen
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.mxfp4 import dequantize

SHIPPED = ROOT / "tests" / "data" / "mxfp4_cases.safetensors"
SHARED = ROOT.parent / "shared" / "cases"
PRESETS = [preset for preset in PRESETS if preset != AUTO]  # which is another one's choices
COMBINATIONS = [(preset, "fp32") for preset in PRESETS] + [
    pytest.param(preset, "bf16", marks=() if preset in ("paddle", "torch") else pytest.mark.slow) for preset in PRESETS
]


@functools.cache
def cases(name: str) -> dict[str, paddle.Tensor]:
    """All golden tensors of ../shared where it is, else those that ship."""
    full = SHARED / f"{name}.safetensors"
    return load_file(full if full.is_file() else SHIPPED)


def groups(name: str, pattern: str) -> list[str]:
    """The beginnings of names that there are cases of."""
    return sorted({found[0] for key in cases(name) if (found := re.match(pattern, key))})


def trainer(preset="paddle", precision="fp32", packed=True, lora=None, initial_state=None, weights: Path | None = None,
            **changes) -> Trainer:
    """A trainer of the smallest model with every mechanism."""
    values = {"gradient_accumulation_steps": 1, "steps": 10} | changes
    model, train = configs(expert_weight_format="mxfp4" if packed else "precision", **values)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (64, train.sequence_length + 1))
    return Trainer(model, train, Policy.preset(preset), tokens, precision=precision, lora=lora,
                   initial_state=initial_state, weights=weights)  # fmt: skip


def unpacked_state(model) -> dict[str, np.ndarray]:
    """Parameters and buffers as a model without packed experts has them, with the same numbers; bfloat16 widened."""
    state = {name: widen(t).numpy() if t.is_floating_point() else t.numpy() for name, t in named_tensors(model).items()}
    for path in packed_weights(model):
        state[f"{path}.weight"] = dequantize(state[f"{path}.weight"], state.pop(f"{path}.weight_scale"))
    return state
