"""ModelConfig: the shape of a DeepSeek-V4 model under Hugging Face's field names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.files import read_model_section
from paddledsv4.config.huggingface import to_raw_style
from paddledsv4.errors import UserError

Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Ratios = Annotated[tuple[int, ...], Field(strict=False)]  # JSON has lists, not tuples

SLIDING_WINDOW_ONLY, COMPRESSED_SPARSE, HEAVILY_COMPRESSED = 0, 4, 128
COMPRESS_RATIOS = (SLIDING_WINDOW_ONLY, COMPRESSED_SPARSE, HEAVILY_COMPRESSED)


class RopeScaling(StrictConfig):
    """YaRN parameters of the rotary tables of compressed layers; lengths in tokens."""

    SECTION: ClassVar[str] = "rope_scaling."

    type: Literal["yarn"]
    factor: Positive
    original_max_position_embeddings: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0


class ModelConfig(StrictConfig):
    """One DeepSeek-V4 model.

    ``compress_ratios`` has one entry per decoder layer followed by one per MTP layer: 0 attends to the
    sliding window only, 4 adds the entries the indexer selects (CSA), 128 adds every compressed entry (HCA).
    """

    model_type: Literal["deepseek_v4"] = "deepseek_v4"

    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_nextn_predict_layers: CountOrNone
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    rms_norm_eps: Positive

    num_attention_heads: Count
    num_key_value_heads: Count = 1
    head_dim: Count
    qk_rope_head_dim: Count
    q_lora_rank: Count
    o_groups: Count
    o_lora_rank: Count
    sliding_window: Count
    compress_ratios: Ratios
    rope_theta: Positive
    compress_rope_theta: Positive
    rope_scaling: RopeScaling

    index_n_heads: Count
    index_head_dim: Count
    index_topk: Count

    hc_mult: Count
    hc_sinkhorn_iters: Count
    hc_eps: Positive

    n_routed_experts: Count
    num_experts_per_tok: Count
    n_shared_experts: CountOrNone
    moe_intermediate_size: Count
    num_hash_layers: CountOrNone
    scoring_func: Literal["sqrtsoftplus"]
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive
    swiglu_limit: Positive

    max_position_embeddings: Count | None = None

    # Known and unused by the computation: what a config.json says about its checkpoint and tokenizer.
    expert_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    topk_method: Literal["noaux_tc"] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._check_compress_ratios()
        self._check_attention()
        self._check_mixture_of_experts()
        if self.tie_word_embeddings:
            self.reject("tie_word_embeddings", "must be false; the output head has its own weight")
        return self

    def _check_compress_ratios(self) -> None:
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != layers:
            self.reject(
                "compress_ratios",
                f"has {len(self.compress_ratios)} entries, must have {layers}: one for each of "
                f"num_hidden_layers ({self.num_hidden_layers}) and "
                f"num_nextn_predict_layers ({self.num_nextn_predict_layers})",
            )
        for index, ratio in enumerate(self.compress_ratios):
            if ratio not in COMPRESS_RATIOS:
                raise UserError(f"compress_ratios.{index} = {ratio}: must be 0, 4 or 128")

    def _check_attention(self) -> None:
        if self.num_key_value_heads != 1:
            self.reject("num_key_value_heads", "must be 1; all heads share one key-value head")
        width = self.num_attention_heads * self.head_dim
        if width % self.o_groups:
            self.reject("o_groups", f"must divide num_attention_heads x head_dim ({width})")
        if self.qk_rope_head_dim % 2:
            self.reject("qk_rope_head_dim", "must be even; rotary embedding turns pairs")
        if self.qk_rope_head_dim > self.head_dim:
            self.reject("qk_rope_head_dim", f"must be at most head_dim ({self.head_dim})")
        if COMPRESSED_SPARSE not in self.compress_ratios:
            return  # no layer has an indexer
        if self.qk_rope_head_dim > self.index_head_dim:
            self.reject("qk_rope_head_dim", f"must be at most index_head_dim ({self.index_head_dim})")
        if self.index_head_dim & (self.index_head_dim - 1):
            self.reject("index_head_dim", "must be a power of two; the indexer applies a Hadamard transform")

    def _check_mixture_of_experts(self) -> None:
        if self.num_experts_per_tok > self.n_routed_experts:
            self.reject("num_experts_per_tok", f"must be at most n_routed_experts ({self.n_routed_experts})")
        if self.num_hash_layers > self.num_hidden_layers:
            self.reject("num_hash_layers", f"must be at most num_hidden_layers ({self.num_hidden_layers})")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Build from a bundle's ``model``, a released config.json or one written by transformers.

        Raises:
            UserError: one sentence about the first mistake found, opened by ``where``.
        """
        try:
            return cls.model_validate(to_raw_style(values, known=cls.model_fields))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a config.json, a bundle.json, a folder with either, or a yaml recipe's ``model:`` section.

        Raises:
            UserError: no such file, not readable as JSON or YAML, no model in it, or an illegal field.
        """
        values, where = read_model_section(Path(path))
        return cls.from_dict(values, where=str(where))

    @property
    def max_positions(self) -> int:
        """The longest sequence in tokens: ``max_position_embeddings``, or else what YaRN stretches the original to."""
        stretched = int(self.rope_scaling.original_max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings or stretched

    def layer_ratio(self, layer: int) -> int:
        """Compress ratio of decoder layer ``layer`` (from 0); MTP layer j is ``num_hidden_layers + j``."""
        return self.compress_ratios[layer]

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the router of this layer looks experts up by token id; an MTP layer never does."""
        return 0 <= layer < self.num_hash_layers
