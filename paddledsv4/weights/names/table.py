"""Every tensor of a DeepSeek-V4 model, once: its name on each side, its shape, its dtype in the released files.

The unit of the table is an *atom*: the largest piece that no side cuts further. A side may keep several atoms in one
tensor, one below the other along dimension 0: Megatron joins w1 and w3 of an expert, the released files the three gate
scales of a hyper-connection, transformers all experts of a layer. ``join("linear_fc1.weight", 0, 2)`` is the first of
two such pieces. Source: peers-spec section 7. This module imports no framework: a Megatron job reads it too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["FP4", "FP8", "BF16", "F32", "I64"]  # how the released files keep an atom
When = Literal["always", "compressed", "indexed", "learned", "hash", "shared"]  # which layers have it


class Slot(NamedTuple):
    """Where a side keeps an atom: piece ``part`` of ``parts`` in the tensor ``name``; ``stacked``: per expert."""

    name: str
    part: int = 0
    parts: int = 1
    stacked: bool = False


class Row(NamedTuple):
    """One atom of every layer that has it. ``shape`` names dimensions of :func:`dimensions`; {e} is the expert."""

    ours: Slot | str
    released: Slot | str
    transformers: Slot | str
    kind: Kind
    shape: str
    when: When = "always"

    def slot(self, side: str) -> Slot:
        """The place on ``side``: ours, released or transformers."""
        place = getattr(self, side)
        return Slot(place) if isinstance(place, str) else place


class Section(NamedTuple):
    """What stands before the names of a group of rows; {n} is the layer. Without ``transformers``: not there."""

    ours: str
    released: str
    transformers: str | None
    parts: dict[str, tuple[Row, ...]]


def join(name: str, part: int, parts: int) -> Slot:
    """Piece ``part`` of ``parts`` in ``name``."""
    return Slot(name, part, parts)


def stack(name: str, part: int = 0, parts: int = 1) -> Slot:
    """The same within the slice of one expert of ``name`` [experts, ...]."""
    return Slot(name, part, parts, stacked=True)


_CORE = "self_attention.core_attention"
_HF_INDEXER = "self_attn.compressor.indexer"


def _compressor(ours: str, released: str, theirs: str, entry: str, head: str, when: When) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.ape", f"{released}.ape", f"{theirs}.position_bias", "F32", f"ratio {entry}", when),
        Row(f"{ours}.linear_wkv.weight", f"{released}.wkv.weight", f"{theirs}.kv_proj.weight",
            "BF16", f"{entry} hidden", when),
        Row(f"{ours}.linear_wgate.weight", f"{released}.wgate.weight", f"{theirs}.gate_proj.weight",
            "BF16", f"{entry} hidden", when),
        Row(f"{ours}.norm.weight", f"{released}.norm.weight", f"{theirs}.kv_norm.weight", "BF16", head, when),
    )  # fmt: skip


def _hyper_connection(ours: str, released: str, theirs: str) -> tuple[Row, ...]:
    gates = ("pre", "post", "res")
    return (
        Row(f"{ours}.mapping_proj.weight", f"{released}_fn", f"{theirs}.fn", "F32", "gates streams"),
        Row(f"{ours}.bias", f"{released}_base", f"{theirs}.base", "F32", "gates"),
        *(Row(f"{ours}.alpha_{gate}", join(f"{released}_scale", i, 3), join(f"{theirs}.scale", i, 3), "F32", "one")
          for i, gate in enumerate(gates)),
    )  # fmt: skip


_CONTRACTION = tuple(
    Row(f"hc_head_{end}", f"hc_head_{end}", f"hc_head.hc_{end}", "F32", shape)
    for end, shape in (("fn", "n streams"), ("base", "n"), ("scale", "one"))
)

_ENDS = Section("", "", "", {
    "embedding": (
        Row("embedding.word_embeddings.weight", "embed.weight", "model.embed_tokens.weight", "BF16", "vocab hidden"),
    ),
    "head": (Row("output_layer.weight", "head.weight", "lm_head.weight", "BF16", "vocab hidden"),),
})  # fmt: skip

_DECODER_END = Section("decoder.", "", "model.", {
    "norms": (Row("final_layernorm.weight", "norm.weight", "norm.weight", "BF16", "hidden"),),
    "hyper-connections": _CONTRACTION,
})  # fmt: skip

_LAYER = {
    "norms": (
        Row("input_layernorm.weight", "attn_norm.weight", "input_layernorm.weight", "BF16", "hidden"),
        Row("pre_mlp_layernorm.weight", "ffn_norm.weight", "post_attention_layernorm.weight", "BF16", "hidden"),
        Row("self_attention.q_layernorm.weight", "attn.q_norm.weight", "self_attn.q_a_norm.weight", "BF16", "q_lora"),
        Row("self_attention.kv_layernorm.weight", "attn.kv_norm.weight", "self_attn.kv_norm.weight", "BF16", "head"),
    ),
    "attention projections": (
        Row("self_attention.linear_q_down_proj.weight", "attn.wq_a.weight", "self_attn.q_a_proj.weight",
            "FP8", "q_lora hidden"),
        Row("self_attention.linear_q_up_proj.weight", "attn.wq_b.weight", "self_attn.q_b_proj.weight",
            "FP8", "width q_lora"),
        Row("self_attention.linear_kv_proj.weight", "attn.wkv.weight", "self_attn.kv_proj.weight",
            "FP8", "head hidden"),
        Row("self_attention.linear_o_group_proj", "attn.wo_a.weight", "self_attn.o_a_proj.weight",
            "FP8", "o_lora o_group"),
        Row("self_attention.linear_proj.weight", "attn.wo_b.weight", "self_attn.o_b_proj.weight",
            "FP8", "hidden o_lora"),
        Row(f"{_CORE}.attn_sink", "attn.attn_sink", "self_attn.sinks", "F32", "heads"),
    ),
    "compressors": _compressor(
        f"{_CORE}.compressor", "attn.compressor", "self_attn.compressor", "entry", "head", "compressed"
    ),
    "indexers": (
        Row(f"{_CORE}.indexer.linear_wq_b.weight", "attn.indexer.wq_b.weight", f"{_HF_INDEXER}.q_b_proj.weight",
            "FP8", "index_width q_lora", "indexed"),
        Row(f"{_CORE}.indexer.linear_weights_proj.weight", "attn.indexer.weights_proj.weight",
            f"{_HF_INDEXER}.scorer.weights_proj.weight", "BF16", "index_heads hidden", "indexed"),
        *_compressor(f"{_CORE}.indexer.compressor", "attn.indexer.compressor", _HF_INDEXER,
                     "index_entry", "index_head", "indexed"),
    ),
    "hyper-connections": (
        *_hyper_connection("self_attention_hyper_connection", "hc_attn", "attn_hc"),
        *_hyper_connection("mlp_hyper_connection", "hc_ffn", "ffn_hc"),
    ),
    "router": (
        Row("mlp.router.weight", "ffn.gate.weight", "mlp.gate.weight", "BF16", "experts hidden"),
        Row("mlp.router.expert_bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias", "F32", "experts", "learned"),
        Row("mlp.router.tid2eid", "ffn.gate.tid2eid", "mlp.gate.tid2eid", "I64", "vocab topk", "hash"),
    ),
    "shared experts": (
        Row(join("mlp.shared_experts.linear_fc1.weight", 0, 2), "ffn.shared_experts.w1.weight",
            "mlp.shared_experts.gate_proj.weight", "FP8", "shared hidden", "shared"),
        Row(join("mlp.shared_experts.linear_fc1.weight", 1, 2), "ffn.shared_experts.w3.weight",
            "mlp.shared_experts.up_proj.weight", "FP8", "shared hidden", "shared"),
        Row("mlp.shared_experts.linear_fc2.weight", "ffn.shared_experts.w2.weight",
            "mlp.shared_experts.down_proj.weight", "FP8", "hidden shared", "shared"),
    ),
    "routed experts": (
        Row(join("mlp.experts.local_experts.{e}.linear_fc1.weight", 0, 2), "ffn.experts.{e}.w1.weight",
            stack("mlp.experts.gate_up_proj", 0, 2), "FP4", "expert hidden"),
        Row(join("mlp.experts.local_experts.{e}.linear_fc1.weight", 1, 2), "ffn.experts.{e}.w3.weight",
            stack("mlp.experts.gate_up_proj", 1, 2), "FP4", "expert hidden"),
        Row("mlp.experts.local_experts.{e}.linear_fc2.weight", "ffn.experts.{e}.w2.weight",
            stack("mlp.experts.down_proj"), "FP4", "hidden expert"),
    ),
}  # fmt: skip

_DECODER_LAYER = Section("decoder.layers.{n}.", "layers.{n}.", "model.layers.{n}.", _LAYER)
_MTP_LAYER = Section("mtp.layers.{n}.mtp_model_layer.", "mtp.{n}.", None, _LAYER)
_MTP_END = Section("mtp.layers.{n}.", "mtp.{n}.", None, {
    "norms": (
        Row("enorm.weight", "enorm.weight", "", "BF16", "hidden"),
        Row("hnorm.weight", "hnorm.weight", "", "BF16", "hidden"),
        Row("final_layernorm.weight", "norm.weight", "", "BF16", "hidden"),
    ),
    "projections": (
        Row("e_proj.weight", "e_proj.weight", "", "FP8", "hidden hidden"),
        Row("h_proj.weight", "h_proj.weight", "", "FP8", "hidden hidden"),
    ),
    "hyper-connections": _CONTRACTION,
})  # fmt: skip

ENDS, PER_LAYER, PER_MTP = (_ENDS, _DECODER_END), (_DECODER_LAYER,), (_MTP_LAYER, _MTP_END)
