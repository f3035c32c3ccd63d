"""The sections of bundle.json, read off the objects of a Megatron job. Imports no framework."""

from __future__ import annotations

from typing import Any

from paddledsv4.errors import UserError

# field of bundle.json -> field of Megatron's transformer config
_MODEL = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "v_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "csa_window_size",
    "rope_theta": "rotary_base",
    "compress_rope_theta": "csa_compress_rotary_base",
    "index_n_heads": "dsa_indexer_n_heads",
    "index_head_dim": "dsa_indexer_head_dim",
    "index_topk": "dsa_indexer_topk",
    "hc_mult": "num_residual_streams",
    "hc_sinkhorn_iters": "mhc_sinkhorn_iterations",
    "rms_norm_eps": "layernorm_epsilon",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_hash_layers": "moe_n_hash_layers",
    "scoring_func": "moe_router_score_function",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "swiglu_limit": "activation_func_clamp_value",
    "initializer_range": "init_method_std",
}
_ROPE_SCALING = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_TRAINING = {
    "mtp_loss_scaling_factor": "mtp_loss_scaling_factor",
    "indexer_loss_coeff": "dsa_indexer_loss_coeff",
    "indexer_sparse_loss": "dsa_indexer_use_sparse_loss",
    "seq_aux_loss_coeff": "moe_aux_loss_coeff",
    "expert_bias_update_rate": "moe_router_bias_update_rate",
}


def _read(config: Any, table: dict[str, str]) -> dict[str, Any]:
    absent = [theirs for theirs in table.values() if not hasattr(config, theirs)]
    if absent:
        raise UserError(f"the Megatron config has no {absent[0]}: align captures DeepSeek-V4 models (dsv4_hybrid)")
    return {ours: getattr(config, theirs) for ours, theirs in table.items()}


def model_section(config: Any, vocab_size: int, hc_eps: float) -> dict[str, Any]:
    """bundle.json's ``model``.

    Args:
        config: Megatron's MLATransformerConfig.
        vocab_size: as the model has it, padding included, for the softmax runs over all of it.
        hc_eps: epsilon of the hyper-connections, which some versions keep as a constant of the module.

    Raises:
        UserError: the config lacks a field, so it is no DeepSeek-V4 model.
    """
    shared = (getattr(config, "moe_shared_expert_intermediate_size", None) or 0) // config.moe_ffn_hidden_size
    return {
        "model_type": "deepseek_v4",
        "vocab_size": vocab_size,
        "num_nextn_predict_layers": getattr(config, "mtp_num_layers", None) or 0,
        "num_key_value_heads": 1,
        "compress_ratios": list(config.csa_compress_ratios),
        "rope_scaling": {"type": "yarn"} | _read(config, _ROPE_SCALING),
        "hc_eps": hc_eps,
        "n_shared_experts": shared,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    } | _read(config, _MODEL)


def training_section(
    config: Any, optimizer: Any, rates: list[float], rows: tuple[int, int], microbatches: int
) -> dict[str, Any]:
    """bundle.json's ``training``.

    Args:
        config: Megatron's transformer config.
        optimizer: Megatron's OptimizerConfig.
        rates: learning rate of every captured step. A schedule cannot be told from them, so the section says
            "constant", with the first step's.
        rows: (micro batch size, sequence length).
        microbatches: per step and data-parallel rank.
    """
    return {
        "precision": "bf16" if config.bf16 else "fp32",
        "sequence_length": rows[1],
        "micro_batch_size": rows[0],
        "gradient_accumulation_steps": microbatches,
        "steps": len(rates),
        "optimizer": {
            "name": "adamw",
            "lr": rates[0],
            "schedule": "constant",
            "betas": [optimizer.adam_beta1, optimizer.adam_beta2],
            "eps": optimizer.adam_eps,
            "weight_decay": optimizer.weight_decay,
        },
        "clip_grad_norm": optimizer.clip_grad,
    } | _read(config, _TRAINING)


def parallel_sections(state: Any, world_size: int, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    """bundle.json's ``parallel``, and which rank of each kind this process is.

    Args:
        state: the module megatron.core.parallel_state, or None where nothing is parallel.
    """
    sizes, ranks = {"world_size": world_size}, {"rank": rank}
    kinds = {"data": "data_parallel", "expert": "expert_model_parallel", "tensor": "tensor_model_parallel",
             "context": "context_parallel", "pipeline": "pipeline_model_parallel"}  # fmt: skip
    for kind, theirs in kinds.items():
        sizes[kind] = getattr(state, f"get_{theirs}_world_size")() if state else 1
        ranks[kind] = getattr(state, f"get_{theirs}_rank")() if state else 0
    return sizes, ranks
