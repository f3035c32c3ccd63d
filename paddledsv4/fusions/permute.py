"""Tokens sorted by expert and back: a program for every token and the list of its rows. No atomics on numbers."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, flat, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.permute import permute, unpermute


@permute.variant("fused", "positions by counting, a token's row read once; its gradient: rows added in float32, "
                 "ascending experts", needs="triton", refuses=refusal)
@differentiable
def fused_permute(x: Tensor, probs: Tensor, routing_map: Tensor):
    """x [T, C], probs and map [T, E] -> rows [n, C], their probs [n], their token [n]; n assignments in all."""
    from paddledsv4.kernels import permute as kernel

    check("permute", x, probs)
    x, probs, routing_map = (flat(t, t.shape[-1]) for t in (x, probs, routing_map))
    row_probs, token, starts, lists, by_expert = kernel.assign(CARRIER, probs, routing_map, int(routing_map.sum()))

    def backward(drows, dprobs, _):
        return (kernel.gather(CARRIER, flat(drows, x.shape[-1]), starts, lists),
                kernel.probs_backward(CARRIER, flat(dprobs), routing_map, by_expert), None)

    return (kernel.spread(CARRIER, x, starts, lists), row_probs, token), backward


@unpermute.variant("fused", "a token's rows added in float32, ascending experts", needs="triton", refuses=refusal)
@differentiable
def fused_unpermute(rows: Tensor, token_index: Tensor, tokens: int):
    """rows [n, C], token_index [n] -> [tokens, C]."""
    from paddledsv4.kernels import permute as kernel

    check("unpermute", rows)
    starts, lists = kernel.invert(CARRIER, flat(token_index), tokens)
    out = kernel.gather(CARRIER, flat(rows, rows.shape[-1]), starts, lists)
    return out, lambda dout: (kernel.spread(CARRIER, flat(dout, dout.shape[-1]), starts, lists), None)
