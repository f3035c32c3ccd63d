"""The operations of benchmarks/kernels_mhc.py in plain torch: in float64 the definition, in bfloat16 the unfused."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x, weight, eps=1e-6):
    u = wide(x)
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return (u if weight is None else u * weight).to(x.dtype)


def swiglu(x, prob, limit=10.0):
    gate, up = x.chunk(2, -1)
    h = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (h * prob[:, None]).to(x.dtype)


def rope(x, cos, sin):
    rotary = 2 * cos.shape[1]
    a, b = wide(x[..., -rotary:]).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([x[..., :-rotary], turned.to(x.dtype)], -1)


def compress(kv, score, ape, ratio, overlap):
    def windows(x, fill):
        x = x.unflatten(0, (-1, ratio))
        if not overlap:
            return x
        first, second = x.chunk(2, -1)
        return torch.cat([torch.cat([torch.full_like(first[:1], fill), first[:-1]]), second], 1)

    score = wide(score).unflatten(0, (-1, ratio)) + ape[:, None]
    weight = windows(score.flatten(0, 1), -1e30).softmax(1)
    return (windows(wide(kv), 0.0) * weight).sum(1).to(kv.dtype)


def sinkhorn(logits, iterations=20, eps=1e-6):
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m if logits.dtype == torch.float64 else m.bfloat16()


def aggregate(streams, h_pre):
    tokens, n = h_pre.shape
    return torch.bmm(h_pre[:, None], streams.view(tokens, n, -1))[:, 0]


def mix(h_res, streams, h_post, output):
    tokens, n = h_post.shape
    return torch.baddbmm(h_post[..., None] * output[:, None], h_res.mT, streams.view(tokens, n, -1)).flatten(1)


def project(streams, weight, eps=1e-6):
    x = wide(streams)
    return x @ weight.T, 1.0 / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + eps)


def gates(proj, r, pre, post, res, bias, eps=1e-6, n=4):
    alpha = torch.cat([pre.expand(n), post.expand(n), res.expand(n * n)])
    z = proj * r * alpha + bias
    h_pre, h_post = torch.sigmoid(z[:, :n]) + eps, torch.sigmoid(z[:, n : 2 * n]) * 2
    if z.dtype != torch.float64:
        h_pre, h_post = h_pre.bfloat16(), h_post.bfloat16()
    return h_pre, h_post, z[:, 2 * n :].contiguous()


def contract(streams, fn, base, scale, eps=1e-6):
    x = wide(streams)
    q = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    gate = torch.sigmoid(x @ fn.T * q * scale + base) + eps
    y = (gate[..., None] * x.unflatten(-1, (fn.shape[0], -1))).sum(1)
    return y.to(streams.dtype), streams.view_as(streams)


def permute(x, probs, routing_map):
    expert, token = routing_map.T.nonzero(as_tuple=True)
    return x[token], probs[token, expert]


def unpermute(rows, token, tokens):
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, token, rows)
