"""How large a model is: parameters, training memory and activations, by arithmetic alone.

Nothing is allocated, so the answer for a trillion parameters comes as fast as for a million. Symbols below
are the paper's: C hidden size, n residual streams, H heads of width D, F width of an expert, E experts of
which K are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from paddledsv4.config import ModelConfig
from paddledsv4.config.model import COMPRESSED_SPARSE

FLOAT32, BFLOAT16 = 4, 2
EMBEDDING, HEAD, MTP = "embedding", "head", "multi-token prediction"

ACTIVATION_FORMULA = (
    "elements kept per token for backward, without recomputation and with attention that does not "
    "materialise its gathered keys. Hyper-connections: 2nC + 2C a layer. Attention: 2 q_lora + 4HD + 2D +"
    " o_groups * o_lora + C. Compressor: 2 cD, c = 2 for ratio 4 and 1 for 128. Indexer: Hi*Di + Hi + "
    "4Di. Norms: 2C a layer. Router: 2E. Experts: (K + shared) * (2C + 3F). After the last layer: nC + C."
    " MTP: a layer and (3n + 3)C + vocabulary. Head: C + vocabulary. Logits always take 4 bytes."
)


@dataclass(frozen=True)
class Part:
    """One kind of module, summed over the decoder; MTP is a part of its own.

    ``activated``: parameters that one token uses. ``activations``: elements kept per token for backward.
    """

    name: str
    parameters: int
    activated: int
    activations: int


@dataclass(frozen=True)
class ModelInfo:
    """The parts of a model and what follows from their sums. Bytes are for one copy, before any sharding."""

    parts: tuple[Part, ...]
    logits_per_token: int

    @property
    def parameters(self) -> int:
        """All learned parameters, MTP included; router bias and hash tables are buffers and do not count."""
        return sum(part.parameters for part in self.parts)

    @property
    def parameters_without_mtp(self) -> int:
        return sum(part.parameters for part in self.parts if part.name != MTP)

    @property
    def activated_parameters(self) -> int:
        """Parameters one token uses, without MTP: K of E routed experts, one embedding row, all else."""
        return sum(part.activated for part in self.parts if part.name != MTP)

    def weight_bytes(self, element: int) -> int:
        """Bytes of all weights at ``element`` bytes each."""
        return self.parameters * element

    @property
    def optimizer_bytes(self) -> dict[str, int]:
        """AdamW's two moments, the main gradients, and the master copy of bf16 weights; all float32."""
        one = self.parameters * FLOAT32
        return {"moments": 2 * one, "main_gradients": one, "master_weights_bf16": one}

    def activation_bytes_per_token(self, element: int) -> int:
        """:data:`ACTIVATION_FORMULA` at ``element`` bytes; the logits are float32 at any precision."""
        elements = sum(part.activations for part in self.parts)
        return (elements - self.logits_per_token) * element + self.logits_per_token * FLOAT32

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "parts": {part.name: {k: v for k, v in vars(part).items() if k != "name"} for part in self.parts},
            "parameters": self.parameters,
            "parameters_without_mtp": self.parameters_without_mtp,
            "activated_parameters": self.activated_parameters,
            "weight_bytes": {"fp32": self.weight_bytes(FLOAT32), "bf16": self.weight_bytes(BFLOAT16)},
            "optimizer_bytes": self.optimizer_bytes,
            "activation_bytes_per_token": {
                "fp32": self.activation_bytes_per_token(FLOAT32),
                "bf16": self.activation_bytes_per_token(BFLOAT16),
            },
        }


def model_info(config: ModelConfig) -> ModelInfo:
    """Count a model: exact, but for the activations, an estimate by :data:`ACTIVATION_FORMULA`."""
    c, hidden = config, config.hidden_size
    pieces = [part for layer in range(c.num_hidden_layers) for part in layer_parts(c, c.layer_ratio(layer))]
    pieces += [contraction(c), _dense("norms", hidden, hidden)]  # after the last layer
    names = dict.fromkeys(piece.name for piece in pieces)  # a set that keeps the order
    table = c.vocab_size * hidden
    parts = [Part(EMBEDDING, table, hidden, 0)]
    parts += [_sum(name, (piece for piece in pieces if piece.name == name)) for name in names]
    parts += [_sum(MTP, multi_token_prediction_parts(c)), _dense(HEAD, table, hidden + c.vocab_size)]
    return ModelInfo(tuple(parts), logits_per_token=c.vocab_size * (1 + c.num_nextn_predict_layers))


def layer_parts(config: ModelConfig, ratio: int) -> Iterator[Part]:
    """The parts of one transformer layer whose attention compresses by ``ratio`` (0: not at all)."""
    c = config
    hidden, streams, width = c.hidden_size, c.hc_mult * c.hidden_size, c.num_attention_heads * c.head_dim
    projections = c.q_lora_rank * (hidden + width) + c.head_dim * hidden
    projections += c.o_lora_rank * width + hidden * c.o_groups * c.o_lora_rank
    kept = 2 * c.q_lora_rank + 4 * width + 2 * c.head_dim + c.o_groups * c.o_lora_rank + hidden
    sinks = c.num_attention_heads
    yield _dense("attention projections", projections + sinks, kept)

    has_indexer = ratio == COMPRESSED_SPARSE
    yield _dense("compressors", _compressor(c, ratio, c.head_dim), 2 * _features(ratio, c.head_dim))
    index_width = c.index_n_heads * c.index_head_dim
    indexer = index_width * c.q_lora_rank + c.index_n_heads * hidden + _compressor(c, ratio, c.index_head_dim)
    index_kept = index_width + c.index_n_heads + 2 * _features(ratio, c.index_head_dim)
    yield _dense("indexers", has_indexer * indexer, has_indexer * index_kept)

    mapping = c.hc_mult * (c.hc_mult + 2)  # weights of pre, post and residual mixing
    yield _dense("hyper-connections", 2 * (mapping * streams + mapping + 3), 2 * streams + 2 * hidden)
    yield _dense("norms", 2 * hidden + c.q_lora_rank + c.head_dim, 2 * hidden)

    expert, kept = 3 * hidden * c.moe_intermediate_size, 2 * hidden + 3 * c.moe_intermediate_size
    yield _dense("router", c.n_routed_experts * hidden, 2 * c.n_routed_experts)
    used = c.num_experts_per_tok
    yield Part("routed experts", c.n_routed_experts * expert, used * expert, used * kept)
    yield _dense("shared experts", c.n_shared_experts * expert, c.n_shared_experts * kept)


def contraction(config: ModelConfig) -> Part:
    """The mapping that sums the residual streams before a final norm."""
    streams = config.hc_mult * config.hidden_size
    return _dense("hyper-connections", config.hc_mult * streams + config.hc_mult + 1, streams)


def multi_token_prediction_parts(config: ModelConfig) -> Iterator[Part]:
    """Per MTP layer: two projections, three norms, a transformer layer, a contraction.

    Embedding and head are the decoder's.
    """
    hidden = config.hidden_size
    for depth in range(config.num_nextn_predict_layers):
        kept = (2 * config.hc_mult + 3) * hidden + config.vocab_size
        yield _dense("projections and norms", 2 * hidden * hidden + 3 * hidden, kept)
        yield from layer_parts(config, config.layer_ratio(config.num_hidden_layers + depth))
        yield contraction(config)


def _sum(name: str, parts: Iterable[Part]) -> Part:
    parts = list(parts)
    counts = ([part.parameters, part.activated, part.activations] for part in parts)
    return Part(name, *map(sum, zip(*counts, strict=True))) if parts else Part(name, 0, 0, 0)


def _dense(name: str, parameters: int, activations: int) -> Part:
    return Part(name, parameters, parameters, activations)


def _features(ratio: int, width: int) -> int:
    """Features per token entering a compressor; ratio 4 overlaps two groups and so needs them twice."""
    if not ratio:
        return 0
    return 2 * width if ratio == COMPRESSED_SPARSE else width


def _compressor(config: ModelConfig, ratio: int, width: int) -> int:
    """Values, gates, position bias and norm of a compressor to entries of ``width``."""
    if not ratio:
        return 0
    return _features(ratio, width) * (2 * config.hidden_size + ratio) + width
