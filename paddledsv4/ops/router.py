"""Expert choice: affinities, learned and hash selection, their normalised weights, the sequence balance loss."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import widen

router_logits = define("router_logits", "gating GEMM in float32", spec="9.1", outputs=("logits",))
router_scores = define("router_scores", "sqrt(softplus(logits))", spec="9.2", outputs=("scores",))
router_topk = define("router_topk", "the experts with the largest biased affinity", spec="9.2", outputs=("index",))
router_probs = define("router_probs", "weights of the chosen experts, normalised and scaled, and the routing map",
                      spec="9.2", outputs=("probs", "map"))
sequence_aux_loss = define("sequence_aux_loss", "balance loss of every sequence", spec="9.3", outputs=("loss",))

TINY = 1e-20  # keeps a normalisation finite; no effect on any sum of affinities


@router_logits.variant("paddle", "paddle.matmul in float32 or wider")
def paddle_router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [s, b, C], weight [E, C] -> [s, b, E] in float32 or wider."""
    return paddle.matmul(widen(x).reshape([-1, x.shape[-1]]), widen(weight), transpose_y=True).reshape(
        [*x.shape[:-1], weight.shape[0]]
    )


@router_scores.variant("paddle", "differentiated by autograd")
def paddle_router_scores(logits: Tensor) -> Tensor:
    """[..., E] -> affinities [..., E]."""
    return paddle.sqrt(F.softplus(logits))


@router_topk.variant("paddle", "paddle.topk, best first")
def paddle_router_topk(scores: Tensor, expert_bias: Tensor | None, topk: int) -> Tensor:
    """scores [T, E], expert_bias [E] or None -> expert ids [T, K] int64. The bias selects and weighs nothing."""
    biased = scores.detach() if expert_bias is None else scores.detach() + expert_bias.astype(scores.dtype)
    return paddle.topk(biased, topk, -1)[1]


@router_probs.variant("paddle", "scatter by put_along_axis")
def paddle_router_probs(scores: Tensor, index: Tensor, scaling: float, normalise: bool) -> tuple[Tensor, Tensor]:
    """scores [T, E], index [T, K] -> probs [T, E], zero outside the choice, and map [T, E] bool."""
    chosen = paddle.take_along_axis(scores, index, 1)
    if normalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + TINY)
    probs = paddle.put_along_axis(paddle.zeros_like(scores), index, chosen * scaling, 1)
    return probs, F.one_hot(index, scores.shape[1]).sum(1).astype("bool")


@sequence_aux_loss.variant("paddle", "differentiated by autograd")
def paddle_sequence_aux_loss(scores: Tensor, sequences: int, topk: int, coeff: float) -> Tensor:
    """scores [s*b, E], rows s-major -> loss [1].

    Per sequence: sum over experts of (sum of normalised affinities) (count of tokens whose top-k, without bias,
    holds the expert) E coeff / (K s^2); then the mean over the b sequences.
    """
    tokens, experts = scores.shape
    s = tokens // sequences
    normal = scores / (scores.sum(-1, keepdim=True) + TINY)
    index = paddle.topk(normal.detach(), topk, -1)[1]
    chosen = F.one_hot(index, experts).sum(1)
    per_sequence = [s, sequences * experts]
    load = normal.reshape(per_sequence).sum(0) * chosen.reshape(per_sequence).sum(0).astype(scores.dtype)
    return (load.sum() * (experts * coeff / (topk * s * s)) / sequences).reshape([1])


expert_bias_update = define("expert_bias_update", "load balancing without a gradient", spec="9.7", outputs=())


@expert_bias_update.variant("paddle", "bias += sign(mean - count) * rate, in place")
def paddle_expert_bias_update(expert_bias: Tensor, counts: Tensor, rate: float) -> None:
    """expert_bias [E], counts [E]: tokens of the step per expert."""
    expert_bias.add_(paddle.sign(counts.mean() - counts) * rate)
