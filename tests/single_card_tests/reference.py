"""The recorded first step of the shipped bundles tiny-fp32 and tiny-bf16, and our own run of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import load_file

from align.tensors import read_tensors
from align.trace import Tracer
from paddledsv4.config import ModelConfig, TrainConfig
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.step import auxiliary_losses, microbatch_gradients
from paddledsv4.weights.load import load_megatron_state
from paddledsv4.weights.state import rename

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "align" / "data"
TINY = BUNDLES / "tiny-fp32"
SAMPLES = ROOT / "tests" / "data" / "tiny_fp32_samples.safetensors"
HF_TINY = ROOT / "tests" / "data" / "hf_tiny"
FULL_TRACE = ROOT.parent / "shared" / "reference" / "tiny-fp32" / "trace"


@dataclass
class Pass:
    """What one model did with the first step's microbatches: tensors of the first, gradients of both."""

    forward: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    parameter_gradients: dict[str, np.ndarray]
    losses: list[tuple[float, float]]


def tiny_configs(bundle: str = "tiny-fp32") -> tuple[ModelConfig, TrainConfig]:
    bundle = json.loads((BUNDLES / bundle / "bundle.json").read_text())
    return ModelConfig.from_dict(bundle["model"]), TrainConfig.from_dict(bundle["training"])


def initial_state(bundle: str = "tiny-fp32") -> dict[str, np.ndarray]:
    return read_tensors(BUNDLES / bundle / "init.safetensors")


def tiny_model(preset: str = "paddle", precision: str = "fp32") -> DeepseekV4Model:
    bundle = "tiny-bf16" if precision == "bf16" else "tiny-fp32"
    model = DeepseekV4Model(tiny_configs(bundle)[0], Policy.preset(preset), precision)
    load_megatron_state(model, initial_state(bundle))
    return model


def microbatch(index: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    rows = np.load(TINY / "tokens.npy")[2 * index : 2 * index + 2].astype("int64")
    return paddle.to_tensor(rows[:, :-1]), paddle.to_tensor(rows[:, 1:])


def run_first_step(model: DeepseekV4Model, microbatches: int = 2) -> Pass:
    """Forward and backward of the first step, traced in its first microbatch; the weights stay as they are."""
    train = tiny_configs()[1]
    optimizer, auxiliary, losses = Optimizer(model, train), auxiliary_losses(train), []
    mask = paddle.ones([2, train.sequence_length], optimizer.states[0].main_grad.dtype)
    with Tracer(model) as tracer:
        main, mtp = microbatch_gradients(model, auxiliary, *microbatch(0), mask)
    losses.append((float(main), float(mtp)))
    optimizer.accumulate()
    for index in range(1, microbatches):
        main, mtp = microbatch_gradients(model, auxiliary, *microbatch(index), mask)
        losses.append((float(main), float(mtp)))
        optimizer.accumulate()
    gradients = {state.name: state.main_grad.numpy() for state in optimizer.states}
    return Pass(tracer.forward, tracer.gradients, gradients, losses)


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 error in float64; of integers and booleans, the share that differs. NaN compares as infinite."""
    if reference.dtype.kind in "bi":
        return float((ours != reference).mean())
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    error = np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-300)
    return float(error) if np.isfinite(error) else float("inf")


def sample_positions(name: str, size: int, count: int = 256) -> np.ndarray:
    """Positions of the shipped samples of a tensor with ``size`` elements; every position of a small one."""
    if size <= count:
        return np.arange(size)
    seed = int.from_bytes(name.encode(), "little") % (2**32)
    return np.sort(np.random.default_rng(seed).choice(size, count, replace=False))


def reference_tensors(kind: str) -> dict[str, np.ndarray]:
    """Recorded tensors of ``kind`` (forward, activation_grads, param_grads): in full from ../shared where it is,
    else 256 sampled elements of each, which the project ships."""
    if FULL_TRACE.is_dir():
        return load_file(FULL_TRACE / f"{kind}.safetensors")
    prefix = f"{kind}/"
    return {n[len(prefix) :]: t for n, t in load_file(SAMPLES).items() if n.startswith(prefix)}


def align_shapes(name: str, ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Our tensor in the form that the reference has it: batch element 0 of an "@b0", or its samples."""
    if name.endswith("@b0"):  # sequence first, batch second
        ours = ours[:, :1]
    if ours.size == reference.size:
        return ours.reshape(reference.shape)
    return ours.reshape(-1)[sample_positions(name, ours.size)]


def errors(reference: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, float]:
    """name -> relative error, for every recorded tensor that the tracer names too."""
    result = {}
    for name, tensor in reference.items():
        mine = ours.get(name.removesuffix("@b0"))
        if mine is not None:
            result[name] = relative_error(align_shapes(name, mine, tensor), tensor)
    return result


def hf_model(preset: str = "hf") -> DeepseekV4Model:
    """The tiny model of Hugging Face transformers with its weights."""
    config = ModelConfig.from_file(HF_TINY / "config.json")
    model = DeepseekV4Model(config, Policy.preset(preset))
    load_megatron_state(model, rename(load_file(HF_TINY / "weights.safetensors"), config, "hf"))
    return model


def hf_logits_error(model: DeepseekV4Model) -> float:
    """Largest absolute difference of a logit of batch element 0 from the recorded ones; infinite if not finite."""
    golden = load_file(HF_TINY / "golden.safetensors")
    with paddle.no_grad():
        logits = model(paddle.to_tensor(golden["input_ids"]))[:, :1].transpose([1, 0, 2]).numpy()
    error = float(np.abs(logits - golden["logits@b0"]).max())
    return error if np.isfinite(error) else float("inf")
