"""The ways in which Hugging Face files write a deepseek_v4 config, brought to the released style.

Released (and bundles): ``compress_ratios`` with one number per layer, ``num_hash_layers``, ``rope_scaling``.
transformers: ``layer_types`` with ``compress_rates``, ``mlp_layer_types``, ``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paddledsv4.config.base import did_you_mean
from paddledsv4.errors import UserError

# Bookkeeping of transformers that says nothing about what a training step computes.
IGNORED_KEYS = (
    "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label",
    "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "problem_type", "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip

# Switches of the architecture family that this model has in one position only.
FIXED_VALUES = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "router_jitter_noise": 0.0,
}
TRANSFORMERS_KEYS = (
    "layer_types", "compress_rates", "mlp_layer_types", "rope_parameters", "partial_rotary_factor",
)  # fmt: skip
ATTENTION_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
MLP_TYPES = ("hash_moe", "moe")


def to_raw_style(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """A copy in the released style with only keys among ``known``; values are not validated here.

    Raises:
        UserError: an unknown key, a switch in a position this model does not have, or styles that contradict.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"model = {values!r}: must be a mapping")
    legal = {*known, *IGNORED_KEYS, *FIXED_VALUES, *TRANSFORMERS_KEYS}
    for key in values:
        if key not in legal:
            raise UserError(f"{key} is not a known key{did_you_mean(str(key), legal)}")
    for key, fixed in FIXED_VALUES.items():
        if key in values and (
            values[key] != fixed or isinstance(values[key], bool) != isinstance(fixed, bool)
        ):
            raise UserError(f"{key} = {values[key]!r}: must be {str(fixed).lower()}")
    raw = {key: value for key, value in values.items() if key in set(known)}
    if "layer_types" in values:
        _set(raw, "compress_ratios", _compress_ratios(values), source="layer_types")
    if "mlp_layer_types" in values:
        _set(raw, "num_hash_layers", _num_hash_layers(values["mlp_layer_types"]), source="mlp_layer_types")
    _rotary(values, raw)
    return raw


def _set(raw: dict[str, Any], field: str, value: Any, source: str) -> None:
    """Set a derived field; one that is also given must agree, its MTP entries being free."""
    given = raw.get(field)
    if isinstance(given, list | tuple):
        agrees = list(given[: len(value)]) == value
    else:
        agrees = given is None or given == value
    if not agrees:
        raise UserError(f"{field} = {given!r}: contradicts {source}, which gives {value!r}")
    raw[field] = value if given is None else given


def _compress_ratios(values: Mapping[str, Any]) -> list[Any]:
    """One ratio per entry of ``layer_types``, then 0 (sliding window only) for every MTP layer."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    rates |= values.get("compress_rates") or {}
    ratios = []
    for index, kind in enumerate(_list(values, "layer_types")):
        if kind not in ATTENTION_TYPES:
            raise UserError(f"layer_types.{index} = {kind!r}: must be one of: {', '.join(ATTENTION_TYPES)}")
        ratios.append(0 if kind == "sliding_attention" else rates[kind])
    given = values.get("compress_ratios")
    mtp = values.get("num_nextn_predict_layers", 0)
    return ratios + [0] * (mtp if isinstance(mtp, int) and given is None else 0)


def _num_hash_layers(kinds: Any) -> int:
    kinds = _list({"mlp_layer_types": kinds}, "mlp_layer_types")
    for index, kind in enumerate(kinds):
        if kind not in MLP_TYPES:
            raise UserError(f"mlp_layer_types.{index} = {kind!r}: must be one of: {', '.join(MLP_TYPES)}")
    count = kinds.count("hash_moe")
    if "moe" in kinds[:count]:
        raise UserError(f"mlp_layer_types = {kinds!r}: every hash_moe must come before the first moe")
    return count


def _rotary(values: Mapping[str, Any], raw: dict[str, Any]) -> None:
    parameters = values.get("rope_parameters") or {}
    main, compress = parameters.get("main") or {}, parameters.get("compress") or {}
    for field, table in (("rope_theta", main), ("compress_rope_theta", compress)):
        if "rope_theta" in table:
            _set(raw, field, table["rope_theta"], source="rope_parameters")
    scaling = raw.get("rope_scaling") or compress
    if isinstance(scaling, Mapping) and scaling:
        if scaling.get("attention_factor", 1.0) != 1.0:
            raise UserError(
                f"rope_scaling.attention_factor = {scaling['attention_factor']!r}: must be 1.0; "
                "DeepSeek-V4 does not scale its rotary tables"
            )
        beside = ("rope_type", "attention_factor", "rope_theta", "partial_rotary_factor")
        raw["rope_scaling"] = {key: value for key, value in scaling.items() if key not in beside}
        raw["rope_scaling"].setdefault("type", scaling.get("rope_type"))
    fraction = main.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if isinstance(fraction, int | float) and isinstance(raw.get("head_dim"), int):
        _set(raw, "qk_rope_head_dim", round(fraction * raw["head_dim"]), source="partial_rotary_factor")


def _list(values: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(values[field], list | tuple):
        raise UserError(f"{field} = {values[field]!r}: must be a list")
    return list(values[field])
