"""The lightning indexer's scores, and its choice of entries, as kernels."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import refusal, refuse
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.indexer import indexer_score, indexer_topk
from paddledsv4.ops.precision import dtype_name


@indexer_score.variant("fused", "Triton, heads summed in registers, products recomputed in backward", needs="triton",
                       refuses=refusal)
@differentiable
def fused_indexer_score(query: Tensor, key: Tensor, weights: Tensor):
    """query [s, b, h, d], key [g, b, d], weights [s, b, h] -> scores [b, s, g] float32, not masked."""
    from paddledsv4.kernels import indexer_score as kernel

    refuse("indexer_score", kernel.limits(CARRIER, query))
    tensors = [x.contiguous() for x in (query, key, weights)]

    def backward(dscores):
        return kernel.backward(CARRIER, dscores.contiguous(), *tensors)

    return kernel.forward(CARRIER, *tensors), backward


@indexer_topk.variant("fused", "Triton, threshold bit by bit; ascending, ties to the lowest entry", needs="triton",
                      refuses=refusal)
def fused_indexer_topk(scores: Tensor, topk: int, ratio: int, offset: int = 0) -> Tensor:
    """scores [b, s, g] float32 -> [b, s, min(topk, g)] int32, -1: none."""
    from paddledsv4.kernels import indexer_topk as kernel

    found = dtype_name(scores)
    refuse("indexer_topk", "" if found == "float32" else f"scores are {found}, not float32")
    return kernel.forward(CARRIER, scores.contiguous(), topk, ratio, offset)
