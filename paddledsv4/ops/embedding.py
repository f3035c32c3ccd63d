"""Token embedding, sequence first."""

from __future__ import annotations

from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define

embedding = define("embedding", "rows of the embedding table, [b, s] ids to [s, b, C]", spec="2")


@embedding.variant("paddle", "F.embedding, then transposed",
                   same_bits="gradients of one token add in the order of the ids")
def paddle_embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """input_ids [b, s] int64, weight [V, C] -> [s, b, C]."""
    return F.embedding(input_ids, weight).transpose([1, 0, 2])


@megatron_order(embedding, "F.embedding on [b, s], then transposed: gradients add in batch-major order",
                same_bits="gradients of one token add in the order of the ids")
def megatron_embedding(K, input_ids, weight):
    return K.contiguous(K.permute(K.embedding(input_ids, weight), 1, 0, 2))
