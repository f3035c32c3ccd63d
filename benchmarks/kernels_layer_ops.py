"""The operations of benchmarks/kernels_layer.py: on the fused kernels, and in plain torch."""

from __future__ import annotations

import torch

from benchmarks import kernels_attn_torch as attn
from benchmarks import kernels_mhc_plain as plain
from benchmarks.kernels_layer import EPS, ITERATIONS, LIMIT, STREAMS
from benchmarks.torch_carrier import CARRIER as C
from paddledsv4.kernels import (
    compress,
    hc_gates,
    hc_mapping,
    hc_mix,
    indexer_score,
    indexer_topk,
    packed_linear,
    permute,
    rms_norm,
    rope,
    sinkhorn,
    sparse_attention,
    swiglu,
)


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *tensors):
        out, ctx.back = function(*(t.detach() if isinstance(t, torch.Tensor) else t for t in tensors))
        return out

    @staticmethod
    def backward(ctx, *grads):
        back, ctx.back = ctx.back, None
        return None, *back(*(g.contiguous() for g in grads))


def op(function):
    """``function(self, *args) -> outputs, backward`` as a differentiable method."""
    return lambda self, *args: _Op.apply(lambda *tensors: function(self, *tensors), *args)


class Fused:
    """Tokens first, one sequence."""

    @op
    def project(self, streams, weight):
        proj, r, root = hc_mapping.project(C, streams, weight, EPS)
        return (proj, r), lambda dproj, dr: hc_mapping.project_backward(C, dproj, dr, streams, weight, r, root)

    @op
    def gates(self, proj, r, pre, post, res, bias):
        def backward(*grads):
            dproj, dr, dalphas, dbias = hc_gates.backward(C, *grads, proj, r, (pre, post, res), bias, STREAMS)
            return dproj, dr, *dalphas, dbias

        return hc_gates.forward(C, proj, r, (pre, post, res), bias, STREAMS, EPS, "bfloat16"), backward

    @op
    def sinkhorn(self, logits):
        out = sinkhorn.forward(C, logits, ITERATIONS, EPS, "bfloat16")
        return out, lambda dout: (sinkhorn.backward(C, dout, logits, ITERATIONS, EPS),)

    @op
    def rms_norm(self, x, weight):
        return rms_norm.forward(C, x, weight, EPS), lambda dy: rms_norm.backward(C, dy, x, weight, EPS)

    @op
    def aggregate(self, streams, h_pre):
        return hc_mix.aggregate(C, streams, h_pre), lambda dy: hc_mix.aggregate_backward(C, dy, streams, h_pre)

    @op
    def mix(self, *args):
        return hc_mix.mix(C, *args), lambda dy: hc_mix.mix_backward(C, dy, *args)

    @op
    def rope(self, x, cos, sin, inverse):
        cos, sin = cos.contiguous(), sin.contiguous()
        turn = lambda x, back: rope.rotate(C, x.contiguous(), cos, sin, back)  # noqa: E731
        return turn(x, inverse), lambda dy: (turn(dy, not inverse), None, None, None)

    @op
    def compress(self, kv, score, ape, ratio):
        kv, score = kv[:, None], score[:, None]

        def backward(dout):
            dkv, dscore, dape = compress.backward(C, dout[:, None], kv, score, ape, ratio, True)
            return dkv[:, 0], dscore[:, 0], dape, None

        return compress.forward(C, kv, score, ape, ratio, True)[:, 0], backward

    def select(self, query, key, weights, z):
        weights = (weights * z.index_heads**-0.5).contiguous()
        scores = indexer_score.forward(C, query[:, None], key[:, None], weights[:, None], causal=(z.ratio, 0))
        return indexer_topk.forward(C, scores, z.index_topk, z.ratio)

    @op
    def attend(self, query, kv, compressed, selected, sink, z):
        tensors = query[:, None], kv[:, None], compressed[:, None], selected, sink
        static = {"window": z.window, "ratio": z.ratio, "scale": z.head_dim**-0.5}
        out, lse = sparse_attention.forward(C, *tensors, **static)

        def backward(dout):
            dq, dkv, dcompressed, dsink = sparse_attention.backward(C, dout[:, None], out, lse, *tensors, **static)
            return dq[:, 0], dkv[:, 0], dcompressed[:, 0], None, dsink, None

        return out[:, 0], backward

    @op
    def swiglu(self, x, prob):
        return swiglu.forward(C, x, prob, LIMIT), lambda dy: swiglu.backward(C, dy, x, prob, LIMIT)

    def permute(self, x, probs, routing, rows):
        *_, starts, lists, by_expert = plan = permute.assign(C, probs.detach(), routing, rows)
        prob = _Op.apply(lambda _: (plan[0], lambda d: (permute.probs_backward(C, d, routing, by_expert),)), probs)
        spread = lambda x: (permute.spread(C, x, starts, lists), lambda d: (permute.gather(C, d, starts, lists),))  # noqa: E731
        return _Op.apply(spread, x), prob, (starts, lists)

    def unpermute(self, rows, plan, tokens):
        return _Op.apply(lambda rows: (permute.gather(C, rows, *plan), lambda d: (permute.spread(C, d, *plan),)), rows)

    @op
    def packed(self, x, weight, counts):
        tables = [t.data_ptr() + torch.arange(len(t), device=t.device) * t[0].numel() for t in weight]
        y = packed_linear.forward(C, x, *tables, counts, weight[0].shape[1])
        width = x.shape[1]  # x itself is not kept
        return y, lambda dy: (packed_linear.input_gradient(C, dy, *tables, counts, width), None, None)


class Plain:
    """The same, differentiated by autograd."""

    project = staticmethod(plain.project)
    gates = staticmethod(plain.gates)
    sinkhorn = staticmethod(plain.sinkhorn)
    rms_norm = staticmethod(plain.rms_norm)
    aggregate = staticmethod(plain.aggregate)
    mix = staticmethod(plain.mix)
    swiglu = staticmethod(plain.swiglu)

    def rope(self, x, cos, sin, inverse):
        return plain.rope(x, cos, -sin if inverse else sin)

    def compress(self, kv, score, ape, ratio):
        return plain.compress(kv[:, None], score[:, None], ape, ratio, True)[:, 0]

    def select(self, query, key, weights, z):
        chosen = []
        for first in range(0, len(query), attn.CHUNK):
            part = slice(first, first + attn.CHUNK)
            scaled = weights[part] * (z.index_heads * z.index_dim) ** -0.5
            scores = (torch.relu(query[part] @ key.T) * scaled[..., None]).float().sum(1)
            row, entry = (torch.arange(n, device=key.device) for n in scores.shape)
            scores.masked_fill_(entry >= (first + row[:, None] + 1) // z.ratio, float("-inf"))
            best, index = scores.topk(min(z.index_topk, len(key)))
            chosen.append(torch.where(best.isinf(), -1, index))
        return torch.cat(chosen)[None]

    def attend(self, query, kv, compressed, selected, sink, z):
        keys, parts = torch.cat([kv, compressed]), []
        for first in range(0, len(query), attn.CHUNK):
            last = min(first + attn.CHUNK, len(query))
            index = attn.key_index(selected, first, last, len(query))
            parts.append(attn.attend(query[first:last], keys, index, sink))
        return torch.cat(parts)

    def permute(self, x, probs, routing, rows):
        expert, token = routing.T.nonzero(as_tuple=True)
        return x[token], probs[token, expert], token

    def unpermute(self, rows, token, tokens):
        return plain.unpermute(rows, token, tokens)

    @op
    def packed(self, x, weight, counts):
        """Expert by expert; as in the model, only what is packed is kept."""
        sizes, out = counts.tolist(), weight[0].shape[1]

        def products(rows, transpose):
            parts = zip(rows.split(sizes), *weight, strict=True)
            return torch.cat([r @ (unpack(w, s).T if transpose else unpack(w, s)) for r, w, s in parts])

        assert out == weight[1].shape[1]
        return products(x, True), lambda dy: (products(dy, False), None, None)


def unpack(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, in / 2] and [out, in / 32] -> bfloat16 [out, in]."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    values, codes = torch.cat([magnitudes, -magnitudes]), codes.int()
    pairs = torch.stack([values[codes & 15], values[codes >> 4]], -1)
    return (pairs.view(*scales.shape, 32) * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).bfloat16()
