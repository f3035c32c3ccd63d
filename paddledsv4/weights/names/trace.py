"""The tensors of a trace: where each passes in our layers and in Megatron's.

A trace names the tensors of one pass. The tables below say where each passes on either side. Its paths of layers are
those of the parameter table, which a test checks; no framework is imported, so that a Megatron job reads them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Place:
    """Where a tensor passes: argument or result ``position`` of a layer, or of what the layer calls.

    ``call`` is one of our ops; in Megatron a method of the layer, or else a function that runs while the layer does.
    """

    layer: str
    side: Literal["in", "out"]
    position: int
    call: str | None

    def under(self, path: str) -> Place:
        """The same within the layer at ``path``."""
        return Place(".".join(p for p in (path, self.layer) if p), self.side, self.position, self.call)


@dataclass(frozen=True)
class Traced:
    """One tensor of a trace; a side that never has it as a tensor of its own is None."""

    name: str
    paddle: Place | None
    megatron: Place | None

    def under(self, path: str) -> Traced:
        """The same within the layer at ``path``."""
        ours, theirs = (p and p.under(path) for p in (self.paddle, self.megatron))
        return Traced(f"{path}.{self.name}" if path else self.name, ours, theirs)


def _out(layer: str = "", call: str | None = None, position: int = 0) -> Place:
    return Place(layer, "out", position, call)


def _arg(layer: str = "", call: str | None = None, position: int = 0) -> Place:
    return Place(layer, "in", position, call)


def _same(name: str, place: Place) -> Traced:
    return Traced(name, place, place)


# name in the trace | where Paddle has it | where Megatron has it
_HYPER_CONNECTION = (
    Traced("proj", _out("", "hc_project"), _out("", "_projection_and_get_norm")),
    Traced("r", _out("", "hc_project", 1), _out("", "_projection_and_get_norm", 1)),
    Traced("h_pre", _out("", "hc_gates"), _out("", "compute_mappings")),
    Traced("h_post", _out("", "hc_gates", 1), _out("", "compute_mappings", 1)),
    Traced("h_res", _out("", "sinkhorn"), _out("", "compute_mappings", 2)),
    Traced("aggregated", _out("", "hc_aggregate"), _out("", "aggregate")),
    Traced("post_out", _out("", "hc_mix"), _out("", "fused_h_res_h_post_bda")),
)

_CORE, _INDEXER = "core_attention", "core_attention.indexer"
_ATTENTION = (
    _same("q_down.out", _out("linear_q_down_proj")),
    _same("q_layernorm.out", _out("q_layernorm")),
    _same("kv_layernorm.out", _out("kv_layernorm")),
    _same("compressor.out", _out("core_attention.compressor")),
    Traced("indexer.q", _arg(_INDEXER, "indexer_score", 0), _out(_INDEXER, "forward_before_topk", 0)),
    Traced("indexer.compressor.out", _arg(_INDEXER, "indexer_score", 1), _out(_INDEXER, "forward_before_topk", 1)),
    Traced("indexer.weights", _arg(_INDEXER, "indexer_score", 2), _out(_INDEXER, "forward_before_topk", 2)),
    Traced("indexer.topk", _out(_INDEXER, "indexer_topk"), _out(_CORE, "fused_qk_topk_naive", 1)),
    Traced("indexer.loss", _out(_CORE, "indexer_loss"), _out(_CORE, "compute_dsa_indexer_loss")),
    Traced("topk_idxs", None, _arg(_CORE, "unfused_compressed_sparse_attn", 3)),
    Traced("core.query", _arg(_CORE, "sparse_attention", 0), _arg(_CORE, None, 0)),
    Traced("core.key", _arg(_CORE, "sparse_attention", 1), _arg(_CORE, None, 1)),
    Traced("core.out", _out(_CORE, "sparse_attention"), _out(_CORE)),
    Traced("grouped_o.in", _arg("", "grouped_linear", 0), None),
    Traced("grouped_o.out", _out("", "grouped_linear"), _arg("linear_proj")),
    _same("out", _out()),
)

_MIXTURE_OF_EXPERTS = (
    _same("shared.out", _out("shared_experts")),
    Traced("router.logits", _out("router", "router_logits"), _out("router", "gating")),
    _same("router.probs", _out("router", None, 0)),
    _same("router.map", _out("router", None, 1)),
    Traced("experts.in", _out("", "permute", 0), _arg("experts", None, 0)),
    Traced("experts.probs", _out("", "permute", 1), _arg("experts", None, 2)),
    Traced("experts.tokens_per_expert", _arg("experts", None, 2), _arg("experts", None, 1)),
    _same("experts.out", _out("experts")),
    _same("out", _out()),
)

_LAYER = (
    _same("in", _arg()),
    _same("out", _out()),
    _same("input_layernorm.out", _out("input_layernorm")),
    _same("pre_mlp_layernorm.out", _out("pre_mlp_layernorm")),
    *(row.under("self_attention_hyper_connection") for row in _HYPER_CONNECTION),
    *(row.under("mlp_hyper_connection") for row in _HYPER_CONNECTION),
    *(row.under("self_attention") for row in _ATTENTION),
    *(row.under("mlp") for row in _MIXTURE_OF_EXPERTS),
)

_ENDS = (_same("embedding.out", _out("embedding")), _same("logits", _out("output_layer")))

_DECODER_END = (
    Traced("contract.out", _out("", "hc_contract"), _arg("final_layernorm")),
    _same("final_layernorm.out", _out("final_layernorm")),
    Traced("mhc_multistream", _arg("", "hc_contract"), _arg("", "learned_output_contract")),
)

_MTP = (
    *(_same(f"{name}.out", _out(name)) for name in ("enorm", "hnorm", "e_proj", "h_proj")),
    *(row.under("mtp_model_layer") for row in _LAYER),
    Traced("contract.out", _out("", "hc_contract"), _arg("final_layernorm")),
    _same("final_layernorm.out", _out("final_layernorm")),
)


def traced(layers: int, mtp_layers: int) -> Iterator[Traced]:
    """Every tensor of the trace of a model with so many decoder and MTP layers."""
    yield from _ENDS
    for i in range(layers):
        yield from (row.under(f"decoder.layers.{i}") for row in _LAYER)
    yield from (row.under("decoder") for row in _DECODER_END)
    for i in range(mtp_layers):
        yield from (row.under(f"mtp.layers.{i}") for row in _MTP)
