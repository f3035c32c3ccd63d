"""A Hugging Face transformers state dict under our names (which are Megatron's). Float weights only."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from paddledsv4.errors import UserError

# (pattern of a Hugging Face name, our name); {n} and {e} carry layer and expert numbers over
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.hc_head.hc_fn": "decoder.hc_head_fn",
    "model.hc_head.hc_base": "decoder.hc_head_base",
    "model.hc_head.hc_scale": "decoder.hc_head_scale",
}
_COMPRESSOR = {
    "kv_proj.weight": "linear_wkv.weight",
    "gate_proj.weight": "linear_wgate.weight",
    "position_bias": "ape",
    "kv_norm.weight": "norm.weight",
}
_CORE, _INDEXER = "self_attention.core_attention", "self_attn.compressor.indexer"
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_proj.weight": "self_attention.linear_kv_proj.weight",
    "self_attn.kv_norm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.o_a_proj.weight": "self_attention.linear_o_group_proj",
    "self_attn.o_b_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.sinks": f"{_CORE}.attn_sink",
    **{f"self_attn.compressor.{hf}": f"{_CORE}.compressor.{ours}" for hf, ours in _COMPRESSOR.items()},
    **{f"{_INDEXER}.{hf}": f"{_CORE}.indexer.compressor.{ours}" for hf, ours in _COMPRESSOR.items()},
    f"{_INDEXER}.q_b_proj.weight": f"{_CORE}.indexer.linear_wq_b.weight",
    f"{_INDEXER}.scorer.weights_proj.weight": f"{_CORE}.indexer.linear_weights_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
    "mlp.gate.tid2eid": "mlp.router.tid2eid",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
}
_HYPER_CONNECTIONS = {"attn_hc": "self_attention_hyper_connection", "ffn_hc": "mlp_hyper_connection"}


def _layer_tensors(rest: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of ours that the tensor ``rest`` of one Hugging Face layer holds, by name inside the layer."""
    if rest in _LAYER:
        return {_LAYER[rest]: value}
    if rest == "mlp.experts.gate_up_proj":
        return {f"mlp.experts.local_experts.{e}.linear_fc1.weight": w for e, w in enumerate(value)}
    if rest == "mlp.experts.down_proj":
        return {f"mlp.experts.local_experts.{e}.linear_fc2.weight": w for e, w in enumerate(value)}
    connection, _, part = rest.partition(".")
    ours = _HYPER_CONNECTIONS.get(connection)
    if ours and part == "fn":
        return {f"{ours}.mapping_proj.weight": value}
    if ours and part == "base":
        return {f"{ours}.bias": value}
    if ours and part == "scale":
        return {f"{ours}.alpha_{gate}": value[i : i + 1] for i, gate in enumerate(("pre", "post", "res"))}
    raise UserError(f"weights: Hugging Face tensor of a layer, {rest}, has no place in this model")


def from_huggingface(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename, split and join a transformers state dict; shapes are checked when the result is loaded.

    Raises:
        UserError: a tensor that the model has no place for.
    """
    result: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if name in _TOP:
            result[_TOP[name]] = value
            continue
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            raise UserError(f"weights: Hugging Face tensor {name} has no place in this model")
        if match[2].startswith("mlp.shared_experts.") and not match[2].startswith("mlp.shared_experts.down"):
            continue  # gate and up are joined below
        for ours, tensor in _layer_tensors(match[2], value).items():
            result[f"decoder.layers.{match[1]}.{ours}"] = tensor
    for name, gate in state.items():
        if name.endswith("mlp.shared_experts.gate_proj.weight"):
            layer = name.split(".")[2]
            up = state[name.replace("gate_proj", "up_proj")]
            result[f"decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight"] = np.concatenate([gate, up])
    return result
