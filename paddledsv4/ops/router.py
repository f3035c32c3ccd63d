"""Expert choice: affinities, learned and hash selection, their normalised weights, the sequence balance loss."""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.megatron import megatron_order
from paddledsv4.numerics.registry import define
from paddledsv4.ops.precision import at_least, widen

router_logits = define("router_logits", "gating GEMM in float32", spec="9.1", outputs=("logits",),
                       wide=("logits",))
router_scores = define("router_scores", "sqrt(softplus(logits))", spec="9.2", outputs=("scores",))
router_topk = define("router_topk", "the experts with the largest biased affinity", spec="9.2", outputs=("index",))
router_probs = define("router_probs", "weights of the chosen experts, normalised and scaled, and the routing map",
                      spec="9.2", outputs=("probs", "map"))
sequence_aux_loss = define("sequence_aux_loss", "balance loss of every sequence", spec="9.3", outputs=("loss",))

TINY = 1e-20  # keeps a normalisation finite; no effect on any sum of affinities
LEAST_SOFTPLUS = 1e-12  # that of -27.6; below -103.9 it is zero, where the slope of the square root is infinite


@router_logits.variant("paddle", "paddle.matmul in float32 or wider")
def paddle_router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [s, b, C], weight [E, C] -> [s, b, E] in float32 or wider."""
    return paddle.matmul(widen(x).reshape([-1, x.shape[-1]]), widen(weight), transpose_y=True).reshape(
        [*x.shape[:-1], weight.shape[0]]
    )


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). Paddle's adds to the 1, which leaves a thousandth of error at -10 and zero from -17 on."""
    return paddle.where(x > -5.0, F.softplus(x), paddle.log1p(paddle.exp(x.clip(max=-4.0))))


@router_scores.variant("paddle", "softplus 1e-12 at least: finite slopes from -104 down; differentiated by autograd")
def paddle_router_scores(logits: Tensor) -> Tensor:
    """[..., E] -> affinities [..., E]."""
    return paddle.sqrt(at_least(_softplus(logits), LEAST_SOFTPLUS))


@router_topk.variant("paddle", "paddle.topk, best first", same_bits="the same choice unless scores tie")
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


@sequence_aux_loss.variant("paddle", "affinities of router_scores=paddle, differentiated by autograd")
def paddle_sequence_aux_loss(
    logits: Tensor, sequences: int, topk: int, coeff: float, elsewhere: Tensor | None = None, slices: int = 1
) -> Tensor:
    """logits [s*b, E], rows s-major -> loss [1].

    Per sequence: sum over experts of (sum of normalised affinities) (count of tokens whose top-k, without bias,
    holds the expert) E coeff / (K s^2); then the mean over the b sequences.

    Of sequences that are cut into ``slices``, these are the tokens of one, and ``elsewhere`` [b * E] counts those of
    the others: the loss is this slice's term of the sum over slices.
    """
    tokens, experts = logits.shape
    scores = paddle_router_scores(logits)
    s = tokens // sequences * slices
    normal = scores / (scores.sum(-1, keepdim=True) + TINY)
    index = paddle.topk(normal.detach(), topk, -1)[1]
    chosen = F.one_hot(index, experts).sum(1)
    per_sequence = [-1, sequences * experts]
    counts = chosen.reshape(per_sequence).sum(0).astype(scores.dtype)
    counts = counts if elsewhere is None else counts + elsewhere.astype(scores.dtype)
    load = normal.reshape(per_sequence).sum(0) * counts
    return (load.sum() * (experts * coeff / (topk * s * s)) / sequences).reshape([1])


count_tokens = define("count_tokens", "tokens per expert, added up over the microbatches of a step", spec="9.7",
                      outputs=("counts",))
expert_bias_update = define("expert_bias_update", "load balancing without a gradient", spec="9.7", outputs=())


@count_tokens.variant("paddle", "in float32", same_bits="whole numbers below 2^24 are exact")
def paddle_count_tokens(counts: Tensor, routing_map: Tensor, dtype: str) -> Tensor:
    """counts [E] so far, routing_map [T, E] bool -> counts [E]. ``dtype``: that of the parameters."""
    return counts + routing_map.astype(counts.dtype).sum(0)


@expert_bias_update.variant("paddle", "bias += sign(mean - count) * rate, in place",
                             same_bits="only the sign of a difference counts")
def paddle_expert_bias_update(expert_bias: Tensor, counts: Tensor, rate: float, dtype: str) -> None:
    """expert_bias [E], counts [E]: tokens of the step per expert. ``dtype``: that of the parameters."""
    expert_bias.add_(paddle.sign(counts.mean() - counts) * rate)


# ---- Megatron's order ---------------------------------------------------------------------------------------------


@megatron_order(router_logits, "mm in float32; dx = dl W cast, dW = dl^T x cast", explicit=True)
def megatron_router_logits(K, x, weight):
    rows, wide = K.wide(x).reshape([-1, x.shape[-1]]), K.wide(weight)
    lead = list(x.shape[:-1])

    def backward(dlogits):
        dl = dlogits.reshape([-1, dlogits.shape[-1]])
        dx = K.cast(K.matmul(dl, wide), K.dtype(x)).reshape(x.shape)
        return dx, K.cast(K.matmul(K.permute(dl, 1, 0), rows), K.dtype(weight))

    return K.matmul(rows, K.permute(wide, 1, 0)).reshape([*lead, weight.shape[0]]), backward


@megatron_order(router_scores, "softplus, then sqrt, in float32; the slope is NaN from -104 down")
def megatron_router_scores(K, logits):
    return K.sqrt(K.softplus(K.wide(logits)))


@megatron_order(router_topk, "top-k of scores + bias, sorted", explicit=True,
                same_bits="the same choice unless scores tie")
def megatron_router_topk(K, scores, expert_bias, topk):
    biased = scores if expert_bias is None else scores + K.wide(expert_bias)
    return K.topk(biased, topk)[1], lambda *_: (None,) * (1 if expert_bias is None else 2)


@megatron_order(router_probs, "gather, divide by sum + 1e-20, scale, scatter")
def megatron_router_probs(K, scores, index, scaling, normalise):
    chosen = K.gather(scores, 1, index)
    if normalise:
        chosen = chosen / (K.sum(chosen, -1, keepdim=True) + TINY)
    probs = K.scatter(K.zeros(list(scores.shape), K.dtype(scores), like=scores), 1, index, chosen * scaling)
    return probs, K.cast(K.sum(K.one_hot(index, scores.shape[1]), 1), "bool")


@megatron_order(count_tokens, "in the dtype of the parameters: bfloat16 rounds counts above 256", explicit=True,
                same_bits="whole numbers below 2^24 are exact")
def megatron_count_tokens(K, counts, routing_map, dtype):
    total = K.cast(counts, dtype) + K.cast(K.sum(routing_map, 0), dtype)
    return K.cast(total, K.dtype(counts)), None


@megatron_order(expert_bias_update, "sum / E, sign and rate in the dtype of the parameters; in place", explicit=True,
                same_bits="only the sign of a difference counts")
def megatron_expert_bias_update(K, expert_bias, counts, rate, dtype):
    counts = K.cast(counts, dtype)
    average = K.sum(counts) / counts.shape[0]
    K.add_(expert_bias, K.cast(K.sign(average - counts) * rate, K.dtype(expert_bias)))
    return (), None


@megatron_order(sequence_aux_loss, "sqrt(softplus) anew; sum over s, product, sum, factor, / b")
def megatron_sequence_aux_loss(K, logits, sequences, topk, coeff, elsewhere=None, slices=1):
    tokens, experts = logits.shape
    s = tokens // sequences * slices
    scores = K.sqrt(K.softplus(K.wide(logits)))
    scores = scores / (K.sum(scores, -1, keepdim=True) + TINY)
    chosen = K.cast(K.sum(K.one_hot(K.topk(K.detach(scores), topk)[1], experts), 1), K.dtype(scores))
    per_sequence = [-1, sequences * experts]
    counts = K.sum(chosen.reshape(per_sequence), 0)
    counts = counts if elsewhere is None else counts + K.cast(elsewhere, K.dtype(scores))
    load = K.sum(scores.reshape(per_sequence), 0) * counts
    return (K.sum(load) * (experts * coeff / (topk * s * s)) / sequences).reshape([1])
