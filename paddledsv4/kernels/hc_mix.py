"""Gates on the residual streams of a hyper-connection: aggregate and mix. Spec sections 4.3 and 4.4.

A program has one token: tiles [N, BLOCK] are its N streams, a vector [N] is a column or row of its gates. The gates'
gradients are sums over a token's channels, taken by the program that has them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T

FORWARD, AGGREGATE_BACKWARD, MIX_BACKWARD = 1024, 4096, 256  # channels that a program works on at a time


@triton.jit
def _aggregate(x, h, y, C, N: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    v = tl.load(x + t * (N * C) + n[:, None] * C + c[None, :], (c < C)[None, :], 0.0).to(tl.float32)
    gate = tl.load(h + t * N + n).to(tl.float32)
    tl.store(y + t * C + c, tl.sum(v * gate[:, None], 0).to(y.dtype.element_ty), c < C)


@triton.jit
def _within_threads(v, N: tl.constexpr, BLOCK: tl.constexpr):
    """[N, BLOCK] -> [N, BLOCK / 8]: the sums over the 8 neighbours that one thread has loaded."""
    return tl.sum(tl.reshape(v, [N, BLOCK // 8, 8]), 2)


@triton.jit
def _aggregate_backward(dy, x, h, dx, dh, C, N: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    gate, dgate = tl.load(h + t * N + n).to(tl.float32), tl.zeros([N, BLOCK // 8], tl.float32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        at, inside = t * (N * C) + n[:, None] * C + c[None, :], (c < C)[None, :]
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(dy + t * C + c, c < C, 0.0).to(tl.float32)
        tl.store(dx + at, (gate[:, None] * g[None, :]).to(dx.dtype.element_ty), inside)
        dgate += _within_threads(v * g[None, :], N, BLOCK)
    tl.store(dh + t * N + n, tl.sum(dgate, 1).to(dh.dtype.element_ty))


@triton.jit
def _mix(h, x, post, o, y, C, N: tl.constexpr, BLOCK: tl.constexpr):
    """New stream j = post[j] o + sum_i h[i, j] x_i."""
    t = tl.program_id(0).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    v = tl.load(o + t * C + c, c < C, 0.0).to(tl.float32)
    out = tl.load(post + t * N + n).to(tl.float32)[:, None] * v[None, :]
    for i in tl.static_range(N):
        v = tl.load(x + (t * N + i) * C + c, c < C, 0.0).to(tl.float32)
        out += tl.load(h + (t * N + i) * N + n).to(tl.float32)[:, None] * v[None, :]
    tl.store(y + t * (N * C) + n[:, None] * C + c[None, :], out.to(y.dtype.element_ty), (c < C)[None, :])


@triton.jit
def _mix_backward(dy, h, x, post, o, dh, dx, dpost, do, C, N: tl.constexpr, BLOCK: tl.constexpr):
    """``dgates[j]`` and ``dposts[j]``: column j of dh and entry j of dpost, before their last sum."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    dgates, dposts = (), ()
    for _ in tl.static_range(N):
        dgates = dgates + (tl.zeros([N, BLOCK // 8], tl.float32),)
        dposts = dposts + (tl.zeros([1, BLOCK // 8], tl.float32),)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        at, inside = t * (N * C) + n[:, None] * C + c, c < C
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        out = tl.load(o + t * C + c, inside, 0.0).to(tl.float32)
        dv, dout = tl.zeros([N, BLOCK], tl.float32), tl.zeros([1, BLOCK], tl.float32)
        old_gates, old_posts = dgates, dposts
        dgates, dposts = (), ()
        for j in tl.static_range(N):
            g = tl.load(dy + (t * N + j) * C + c, inside, 0.0).to(tl.float32)
            dv += tl.load(h + t * (N * N) + n * N + j).to(tl.float32)[:, None] * g
            dout += tl.load(post + t * N + j).to(tl.float32) * g
            dgates = dgates + (old_gates[j] + _within_threads(v * g, N, BLOCK),)
            dposts = dposts + (old_posts[j] + _within_threads(out * g, 1, BLOCK),)
        tl.store(dx + at, dv.to(dx.dtype.element_ty), inside)
        tl.store(do + t * C + c, dout.to(do.dtype.element_ty), inside)
    for j in tl.static_range(N):
        tl.store(dh + t * (N * N) + n * N + j, tl.sum(dgates[j], 1).to(dh.dtype.element_ty))
        tl.store(dpost + t * N + j + tl.arange(0, 1), tl.sum(dposts[j], 1).to(dpost.dtype.element_ty))


def _like(carrier: Carrier, *tensors: T) -> list[T]:
    return [carrier.empty(x.shape, carrier.dtype(x), x) for x in tensors]


def _block(width: int, most: int) -> dict[str, int]:
    """At 8 elements, 16 bytes of bfloat16, a thread."""
    block = min(most, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def aggregate(carrier: Carrier, streams: T, h_pre: T) -> T:
    """streams [tokens, n*C], h_pre [tokens, n], contiguous, n a power of two -> [tokens, C]."""
    (tokens, n), width = h_pre.shape, streams.shape[1] // h_pre.shape[1]
    y, tile = carrier.empty([tokens, width], carrier.dtype(streams), streams), _block(width, FORWARD)
    carrier.launch(_aggregate, (tokens, triton.cdiv(width, tile["BLOCK"])), streams, h_pre, y, width, N=n, **tile)
    return y


def aggregate_backward(carrier: Carrier, dy: T, streams: T, h_pre: T) -> tuple[T, T]:
    """dy [tokens, C] -> dstreams, dh_pre."""
    tokens, n = h_pre.shape
    dstreams, dh = _like(carrier, streams, h_pre)
    carrier.launch(_aggregate_backward, (tokens,), dy, streams, h_pre, dstreams, dh, dy.shape[1], N=n,
                   **_block(dy.shape[1], AGGREGATE_BACKWARD))
    return dstreams, dh


def mix(carrier: Carrier, h_res: T, streams: T, h_post: T, output: T) -> T:
    """h_res [tokens, n, n], streams [tokens, n*C], h_post [tokens, n], output [tokens, C] -> [tokens, n*C]."""
    tokens, width = output.shape
    (y,), tile = _like(carrier, streams), _block(width, FORWARD)
    carrier.launch(_mix, (tokens, triton.cdiv(width, tile["BLOCK"])), h_res, streams, h_post, output, y, width,
                   N=h_post.shape[1], **tile)
    return y


def mix_backward(carrier: Carrier, dy: T, h_res: T, streams: T, h_post: T, output: T) -> tuple[T, T, T, T]:
    """dy [tokens, n*C] -> dh_res, dstreams, dh_post, doutput."""
    tokens, width = output.shape
    dh, dstreams, dpost, doutput = _like(carrier, h_res, streams, h_post, output)
    carrier.launch(_mix_backward, (tokens,), dy, h_res, streams, h_post, output, dh, dstreams, dpost, doutput, width,
                   N=h_post.shape[1], **_block(width, MIX_BACKWARD))
    return dh, dstreams, dpost, doutput
