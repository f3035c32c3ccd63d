"""A bundle of a model small enough to train in a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from synthetic import SHIPPED

from align.bundle import SHIPPED as DATA
from align.logwriter import LossLogWriter
from paddledsv4.config import ModelConfig, TrainConfig
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors

SMALL = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_nextn_predict_layers=1, num_attention_heads=2, head_dim=8,
    qk_rope_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=4, sliding_window=8, compress_ratios=[4, 0, 0],
    index_n_heads=2, index_head_dim=8, index_topk=2, hc_mult=2, hc_sinkhorn_iters=3, n_routed_experts=4,
    moe_intermediate_size=8, num_hash_layers=1,
)  # fmt: skip


def small_description(steps: int = 3) -> dict:
    described = json.loads((DATA / SHIPPED / "bundle.json").read_text())
    described["model"] |= SMALL
    described["training"] |= {"steps": steps, "sequence_length": 24}
    return described | {"name": "small"}


def small_trainer(described: dict, state: dict, tokens: np.ndarray, preset: str = "paddle") -> Trainer:
    model, train = ModelConfig.from_dict(described["model"]), TrainConfig.from_dict(described["training"])
    return Trainer(model, train, Policy.preset(preset), tokens=tokens, initial_state=state)


def make_small_bundle(path: Path, steps: int = 3) -> Path:
    """Train it without any capture; what it writes is what capture must not change."""
    described = small_description(steps)
    random = np.random.default_rng(0)
    model = DeepseekV4Model(ModelConfig.from_dict(described["model"]), Policy.preset("paddle"))
    state = {n: t.numpy() for n, t in named_tensors(model).items()}
    state = {n: t + random.normal(0, 0.1, t.shape).astype(t.dtype) if t.dtype.kind == "f" else t
             for n, t in state.items()}  # fmt: skip
    tokens = random.integers(0, 40, (steps * 4, 25)).astype(np.int32)
    path.mkdir()
    (path / "bundle.json").write_text(json.dumps(described))
    save_file(state, path / "init.safetensors")
    np.save(path / "tokens.npy", tokens)
    trainer = small_trainer(described, state, tokens)
    with LossLogWriter(path / "losses.jsonl", {}) as log:
        for result in trainer.train(steps):
            for loss in result.losses:
                log.losses(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
            log.grad_norm(result.step, result.grad_norm)
        log.final_weights(trainer.weights_md5())
    return path
