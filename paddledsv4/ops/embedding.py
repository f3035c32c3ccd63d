"""Token embedding, sequence first."""

from __future__ import annotations

from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.registry import define

embedding = define("embedding", "rows of the embedding table, [b, s] ids to [s, b, C]", spec="2")


@embedding.variant("paddle", "F.embedding, then transposed")
def paddle_embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """input_ids [b, s] int64, weight [V, C] -> [s, b, C]."""
    return F.embedding(input_ids, weight).transpose([1, 0, 2])
