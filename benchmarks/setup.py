"""What is measured: the model's shape at a given width, the optimizer, the tokens. Shared by both engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
          "compressed_sparse_attention"]  # fmt: skip
ROUTERS = ["hash_moe", "hash_moe", "moe", "moe"]
VOCABULARY, EXPERTS, TOP_K = 1024, 8, 2
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Setup:
    """One engine at one size. ``losses`` adds MTP, indexer loss and balance loss, which Hugging Face lacks."""

    engine: str
    hidden: int
    sequence: int
    batch: int
    threads: int = 1
    losses: bool = False
    numerics: str = "paddle"
    peer_host: bool = False
    weights: str | None = None

    as_dict = asdict

    @property
    def label(self) -> str:
        added = " + MTP, indexer, aux" if self.losses else " + our malloc" if self.peer_host else ""
        return self.engine + added


def model_dict(setup: Setup) -> dict[str, Any]:
    """The model in the style of a config.json of transformers, which both engines read."""
    hidden = setup.hidden
    rotary = {"partial_rotary_factor": 0.25}
    return {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "moe_intermediate_size": hidden // 2,
        "num_hidden_layers": len(LAYERS), "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64,
        "q_lora_rank": hidden // 2, "num_experts_per_tok": TOP_K, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
        "layer_types": LAYERS, "mlp_layer_types": ROUTERS,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 10.0, "sliding_window": 64,
        "o_groups": 2, "o_lora_rank": 64, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 16,
        "num_nextn_predict_layers": int(setup.losses), "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "use_cache": False, "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, **rotary},
            "compress": {"rope_type": "yarn", "rope_theta": 160000.0, "factor": 16.0, "beta_fast": 32.0,
                         "beta_slow": 1.0, "original_max_position_embeddings": 256, "attention_factor": 1.0, **rotary},
        },
    }  # fmt: skip


def tokens(setup: Setup, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [b, s] int64 of a step, the same for every engine."""
    row = np.random.default_rng(step).integers(0, VOCABULARY, [setup.batch, setup.sequence + 1])
    return row[:, :-1], row[:, 1:]


def hash_table() -> np.ndarray:
    """[V, K]: the experts of every token id in hash layers, distinct and evenly loaded."""
    return (np.arange(VOCABULARY)[:, None] + np.arange(TOP_K)[None, :]) % EXPERTS
