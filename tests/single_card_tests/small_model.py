"""The smallest model with every mechanism: it trains a step in a fraction of a second."""

from __future__ import annotations

from reference import tiny_configs

from paddledsv4.config import ModelConfig


def configs(**changes):
    """Two layers (one hash, one learned router) and MTP; ``changes`` to the model or the training section."""
    model, train = tiny_configs()
    model = model.replace(
        num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1, sliding_window=8, vocab_size=96,
        hidden_size=64, num_attention_heads=4, index_topk=4, moe_intermediate_size=32, hc_sinkhorn_iters=2,
    )  # fmt: skip
    values = {"sequence_length": 32, "micro_batch_size": 1, "steps": 9, "indexer_loss_scale": "per_microbatch"}
    shape = {name: value for name, value in changes.items() if name in ModelConfig.model_fields}
    return model.replace(**shape), train.replace(**values | {k: v for k, v in changes.items() if k not in shape})
