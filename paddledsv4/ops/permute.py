"""Tokens sorted by expert, and back."""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

permute = define("permute", "token rows grouped by expert, ascending tokens inside", spec="9.4",
                 outputs=("rows", "probs", "token_index"), wide=("probs",))
unpermute = define("unpermute", "sum of every token's expert outputs", spec="9.6")


split_rows = define("split_rows", "the rows of every expert", spec="9.5")
concat_rows = define("concat_rows", "rows of all experts, one after another", spec="9.5")


@permute.variant("paddle", "nonzero of the transposed map, then gather",
                 same_bits="moves rows; gradients of one token add in ascending order of experts")
def paddle_permute(x: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C], probs and map [T, E] -> rows [n, C], their probs [n], their token [n]; n assignments in all."""
    expert, token = paddle.nonzero(routing_map.t(), as_tuple=True)
    expert, token = expert.flatten(), token.flatten()
    flat = token * probs.shape[1] + expert
    return paddle.gather(x, token), paddle.gather(probs.flatten(), flat), token


@unpermute.variant("paddle", "index_add into zeros, ascending experts",
                   same_bits="rows of one token add in ascending order of experts")
def paddle_unpermute(rows: Tensor, token_index: Tensor, tokens: int) -> Tensor:
    """rows [n, C], token_index [n] -> [tokens, C]."""
    return paddle.index_add(paddle.zeros([tokens, rows.shape[-1]], rows.dtype), token_index, 0, rows)


@megatron_order(permute, "rows by nonzero of the transposed map; index_select",
                same_bits="moves rows; gradients of one token add in ascending order of experts")
def megatron_permute(K, x, probs, routing_map):
    expert, token = K.nonzero(K.permute(routing_map, 1, 0))
    rows = K.index_select(x, token)
    flat = K.index_select(K.contiguous(K.permute(probs, 1, 0)).reshape([-1]), expert * x.shape[0] + token)
    return rows, flat, token


@megatron_order(unpermute, "index_add into zeros, in the activation dtype",
                same_bits="rows of one token add in ascending order of experts")
def megatron_unpermute(K, rows, token_index, tokens):
    return K.index_add(K.zeros([tokens, rows.shape[-1]], K.dtype(rows), like=rows), token_index, rows)


@split_rows.variant("paddle", "paddle.split", same_bits="moves rows, computes nothing")
def paddle_split_rows(x: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """x [n, ...] -> one [count, ...] per expert; an expert may have none."""
    return tuple(paddle.split(x, counts))


@megatron_order(split_rows, "split: gradients are concatenated",
                same_bits="moves rows, computes nothing")
def megatron_split_rows(K, x, counts):
    return tuple(K.split(x, counts, 0))


@concat_rows.variant("paddle", "paddle.concat", same_bits="moves rows, computes nothing")
def paddle_concat_rows(*parts: Tensor) -> Tensor:
    """[count, C] per expert -> [n, C]."""
    return paddle.concat(parts)


@megatron_order(concat_rows, "cat: gradients are split",
                same_bits="moves rows, computes nothing")
def megatron_concat_rows(K, *parts):
    return K.cat(list(parts), 0)
