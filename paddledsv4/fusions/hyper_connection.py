"""The operations of hyper-connections as kernels: mapping, Sinkhorn, aggregate, mix, contraction."""

from __future__ import annotations

from paddle import Tensor

from paddledsv4.fusions.launcher import CARRIER
from paddledsv4.fusions.support import check, flat, power_of_two, refusal
from paddledsv4.numerics.function import differentiable
from paddledsv4.ops.hc_mapping import hc_gates, hc_project
from paddledsv4.ops.hc_mix import hc_aggregate, hc_contract, hc_mix
from paddledsv4.ops.sinkhorn import sinkhorn

MOST_STREAMS = 8  # their matrices are held in registers
MOST_GATES = 128  # the projections of a token are one tile of a matrix product


@hc_project.variant("fused", "one pass over the streams; the weight as three bfloat16 numbers on tensor cores",
                    needs="triton", refuses=refusal)
@differentiable
def fused_hc_project(streams: Tensor, weight: Tensor, eps: float):
    """streams [s, b, n*C], weight [m, n*C] -> proj [s, b, m], r [s, b, 1], both in float32."""
    from paddledsv4.kernels import hc_mapping as kernel

    lead, width, gates = streams.shape[:-1], streams.shape[-1], weight.shape[0]
    check("hc_project", streams, weight, rows=(gates, gates <= MOST_GATES, f"of the weight to be at most {MOST_GATES}"))
    x, w = flat(streams, width), weight.astype("float32").contiguous()
    proj, r, root = kernel.project(CARRIER, x, w, eps)

    def backward(dproj, dr):
        dx, dw = kernel.project_backward(CARRIER, flat(dproj, gates), flat(dr, 1), x, w, r, root)
        return dx.reshape(streams.shape), dw.astype(weight.dtype)

    return (proj.reshape([*lead, gates]), r.reshape([*lead, 1])), backward


@hc_gates.variant("fused", "one Triton kernel each way; gradients of alphas and bias in two stages", needs="triton",
                  refuses=refusal)
@differentiable
def fused_hc_gates(
    proj: Tensor, r: Tensor, alpha_pre: Tensor, alpha_post: Tensor, alpha_res: Tensor, bias: Tensor,
    streams: int, eps: float, dtype: str,
):
    """proj [s, b, n*n+2n], r [s, b, 1], alphas [1], bias [n*n+2n], all float32
    -> h_pre [s, b, n] and h_post [s, b, n] in ``dtype``, logits of h_res [s, b, n, n]."""
    from paddledsv4.kernels import hc_gates as kernel

    n, lead, gates = streams, proj.shape[:-1], proj.shape[-1]
    check("hc_gates", proj, streams=power_of_two(n, MOST_STREAMS))
    given = flat(proj, gates), flat(r, 1), (alpha_pre, alpha_post, alpha_res), bias, n
    h_pre, h_post, logits = kernel.forward(CARRIER, *given, eps, dtype)

    def backward(dh_pre, dh_post, dlogits):
        dproj, dr, dalphas, dbias = kernel.backward(
            CARRIER, flat(dh_pre, n), flat(dh_post, n), flat(dlogits, n * n), *given
        )
        return dproj.reshape(proj.shape), dr.reshape(r.shape), *dalphas, dbias

    return (h_pre.reshape([*lead, n]), h_post.reshape([*lead, n]), logits.reshape([*lead, n, n])), backward


@sinkhorn.variant("fused", "a token's matrix in the registers of a thread; backward by recomputation", needs="triton",
                  refuses=refusal)
@differentiable
def fused_sinkhorn(logits: Tensor, iterations: int, eps: float, dtype: str):
    """logits [..., n, n] (last dimension: columns) -> [..., n, n] in ``dtype``; eps is added to entries and sums."""
    from paddledsv4.kernels import sinkhorn as kernel

    n = logits.shape[-1]
    check("sinkhorn", logits, streams=power_of_two(n, MOST_STREAMS))
    flat_logits = flat(logits, n, n)

    def backward(dout):
        return (kernel.backward(CARRIER, flat(dout, n, n), flat_logits, iterations, eps).reshape(logits.shape),)

    return kernel.forward(CARRIER, flat_logits, iterations, eps, dtype).reshape(logits.shape), backward


@hc_aggregate.variant("fused", "one Triton kernel each way, float32 inside", needs="triton", refuses=refusal)
@differentiable
def fused_hc_aggregate(streams: Tensor, h_pre: Tensor):
    """streams [s, b, n*C], h_pre [s, b, n] -> [s, b, C]."""
    from paddledsv4.kernels import hc_mix as kernel

    n, width = h_pre.shape[-1], streams.shape[-1]
    check("hc_aggregate", streams, h_pre, streams=power_of_two(n, MOST_STREAMS))
    x, h = flat(streams, width), flat(h_pre, n)

    def backward(dy):
        dx, dh = kernel.aggregate_backward(CARRIER, flat(dy, width // n), x, h)
        return dx.reshape(streams.shape), dh.reshape(h_pre.shape)

    return kernel.aggregate(CARRIER, x, h).reshape([*h_pre.shape[:-1], width // n]), backward


@hc_mix.variant("fused", "one Triton kernel each way, float32 inside", needs="triton", refuses=refusal)
@differentiable
def fused_hc_mix(h_res: Tensor, streams: Tensor, h_post: Tensor, output: Tensor):
    """h_res [s, b, n, n], streams [s, b, n*C], h_post [s, b, n], output [s, b, C] -> [s, b, n*C]."""
    from paddledsv4.kernels import hc_mix as kernel

    n, width = h_post.shape[-1], streams.shape[-1]
    check("hc_mix", h_res, streams, h_post, output, streams=power_of_two(n, MOST_STREAMS))
    inputs = flat(h_res, n, n), flat(streams, width), flat(h_post, n), flat(output, width // n)

    def backward(dy):
        gradients = kernel.mix_backward(CARRIER, flat(dy, width), *inputs)
        return tuple(g.reshape(x.shape) for g, x in zip(gradients, (h_res, streams, h_post, output), strict=True))

    return kernel.mix(CARRIER, *inputs).reshape(streams.shape), backward


@hc_contract.variant("fused", "float32 inside; the gradient of the streams that pass through is added in the kernel",
                     needs="triton", refuses=refusal)
@differentiable
def fused_hc_contract(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float):
    """streams [s, b, n*C], fn [n, n*C], base [n], scale [1] -> hidden [s, b, C] and the streams for whoever goes on."""
    from paddledsv4.kernels import hc_contract as kernel

    n, width = fn.shape[0], streams.shape[-1]
    check("hc_contract", streams, fn, streams=power_of_two(n, MOST_STREAMS))
    x, fn32 = flat(streams, width), fn.astype("float32").contiguous()
    y, *made = kernel.forward(CARRIER, x, fn32, base, scale, eps)

    def backward(dy, through):
        dx, dfn, dbase, dscale = kernel.backward(
            CARRIER, flat(dy, width // n), flat(through, width), x, fn32, base, scale, *made, eps
        )
        return dx.reshape(streams.shape), dfn.astype(fn.dtype), dbase, dscale

    return (y.reshape([*streams.shape[:-1], width // n]), streams.view(streams.shape)), backward
