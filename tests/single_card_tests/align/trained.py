"""A bundle that a policy of ours recorded: a model so small that three steps take a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from align.bundle import SHIPPED, load_bundle
from align.logwriter import LossLogWriter
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.load import named_tensors

MODEL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 16,
    "num_nextn_predict_layers": 0, "compress_ratios": [4, 0], "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 4, "hc_mult": 2, "hc_sinkhorn_iters": 3, "initializer_range": 0.3, "n_routed_experts": 4,
    "moe_intermediate_size": 16, "num_hash_layers": 1,
}  # fmt: skip
TRAINING = {"sequence_length": 64, "steps": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 1}


def recorded_bundle(path: Path, policy: Policy) -> Path:
    """Make the bundle directory ``path`` with the losses that ``policy`` computes."""
    described = json.loads((SHIPPED / "tiny-fp32" / "bundle.json").read_text())
    described |= {"name": path.name, "source": {"trainer": "paddledsv4 itself"}}
    described["model"] |= MODEL
    described["training"] |= TRAINING
    described["training"]["optimizer"]["lr"] = 0.05  # steps so large that every difference shows
    path.mkdir()
    (path / "bundle.json").write_text(json.dumps(described))
    rows = TRAINING["steps"], TRAINING["sequence_length"] + 1
    np.save(path / "tokens.npy", np.random.default_rng(0).integers(0, MODEL["vocab_size"], rows).astype(np.uint16))
    bundle = load_bundle(path)
    trainer = Trainer(bundle.model, bundle.training, policy, bundle.tokens)
    save_file({name: t.numpy() for name, t in named_tensors(trainer.model).items()}, path / "init.safetensors")
    with LossLogWriter(path / "losses.jsonl", {}) as writer:
        for result in trainer.train(bundle.training.steps):
            for loss in result.losses:
                writer.losses(result.step, loss.microbatch, loss.rank, loss.main, loss.mtp)
    return path
