"""Sparse attention and the lightning indexer at Flash's shapes: cases for benchmarks/kernels.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import kernels_attn_torch as plain
from benchmarks.kernel_case import Case, worst
from benchmarks.torch_carrier import CARRIER
from paddledsv4.kernels import indexer_score, indexer_topk, sparse_attention

SAMPLE = 512  # queries whose float64 truth is computed


def tilelang_forward(x: plain.Inputs):
    """tilelang's example sparse_mla_fwd_pipelined.py, whose file must be importable: not part of the wheel.

    It has no sink, and 64 more dims in the scores than in the values: these are zeros here. It takes one list of rows
    for all keys; what is not there is an index behind its causal limit. Such a key it does not load, and multiplies
    what stands in its memory with zero, which may give NaN: only queries that have all keys are compared.
    """
    from sparse_mla_fwd_pipelined import sparse_mla_fwd

    tokens, none = x.query.shape[0], 1 << 28
    keys = torch.nn.functional.pad(torch.cat([x.kv, x.compressed]), (0, 64)).transpose(0, 1).unsqueeze(2).contiguous()
    query = torch.nn.functional.pad(x.query, (0, 64)).transpose(0, 1).contiguous()
    index = plain.key_index(x.selected, 0, tokens, tokens)
    complete = (index >= 0).all(-1)
    index = torch.where(index < 0, none, index).int()[None, :, None].contiguous()
    start = torch.tensor([none // 2], dtype=torch.int32, device="cuda")
    static = (plain.HEADS, plain.D, 64, index.shape[-1], 1, 1, plain.D**-0.5, True, False)
    kernel = sparse_mla_fwd.compile(query, keys, index, start, *static)
    out = kernel(query, keys, index, start)[0][0]
    ours = sparse_attention.forward(CARRIER, *x.tensors[:4], torch.full_like(x.sink, float("-inf")), **plain.STATIC)[0]
    error = worst([(out[complete], ours[complete, 0])])
    if not error <= 1e-2:
        raise ValueError(f"its result is off by {error:.1e}")
    return lambda: kernel(query, keys, index, start)


def attention(tokens: int) -> Iterator[Case]:
    x = plain.inputs(tokens)

    def forward():
        return sparse_attention.forward(CARRIER, *x.tensors, **plain.STATIC)

    out, lse = forward()

    def backward():
        return sparse_attention.backward(CARRIER, x.dout, out, lse, *x.tensors, **plain.STATIC)

    def check():
        ours = forward()[0][:, 0]
        ranges = [(0, SAMPLE), (tokens - SAMPLE, tokens)]
        return worst((ours[a:b], plain.truth(x, a, b)) for a, b in ranges)

    def check_backward():
        """All queries of a shorter sequence in float64, and the same bits twice at this one."""
        small = plain.inputs(4 * SAMPLE)
        o, norm = sparse_attention.forward(CARRIER, *small.tensors, **plain.STATIC)
        ours = sparse_attention.backward(CARRIER, small.dout, o, norm, *small.tensors, **plain.STATIC)
        exact = plain.unfused_backward(small, torch.float64)
        same = all(torch.equal(a, b) for a, b in zip(backward(), backward(), strict=True))
        return worst((a.reshape(b.shape), b) for a, b in zip(ours, exact, strict=True)) if same else float("nan")

    work = plain.HEADS * plain.D * plain.pairs(tokens)
    yield Case(f"sparse attention, forward, {tokens}", forward, "flops", 4.0 * work, check, 1e-2,
               lambda: plain.unfused_forward(x), {"tilelang": lambda: tilelang_forward(x)}, frozenset({"tilelang"}),
               goal=0.5)  # fmt: skip
    yield Case(f"sparse attention, backward, {tokens}", backward, "flops", 10.0 * work, check_backward, 1e-2,
               lambda: plain.unfused_backward(x), goal=0.35)  # fmt: skip


def indexer(tokens: int) -> Iterator[Case]:
    x = plain.index_inputs(tokens)
    groups = tokens // plain.RATIO

    def forward():
        return indexer_score.forward(CARRIER, x.query, x.key, x.weights)

    def backward():
        return indexer_score.backward(CARRIER, x.dscores, x.query, x.key, x.weights)

    def check():
        exact = plain.score(*(t[-SAMPLE:, 0].double() for t in (x.query,)), x.key[:, 0].double(),
                            x.weights[-SAMPLE:, 0].double())
        return worst([(forward()[0, -SAMPLE:], exact)])

    def check_backward():
        small = plain.index_inputs(2 * SAMPLE)
        ours = indexer_score.backward(CARRIER, small.dscores, small.query, small.key, small.weights)
        exact = plain.unfused_score_backward(small, torch.float64)
        same = all(torch.equal(a, b) for a, b in zip(backward(), backward(), strict=True))
        return worst((a.reshape(b.shape), b) for a, b in zip(ours, exact, strict=True)) if same else float("nan")

    work = 2.0 * tokens * groups * plain.INDEX_HEADS * plain.INDEX_D
    yield Case(f"indexer scores, forward, {tokens}", forward, "flops", work, check, 1e-2,
               lambda: plain.unfused_score(x))  # fmt: skip
    yield Case(f"indexer scores, backward, {tokens}", backward, "flops", 3 * work, check_backward, 1e-2,
               lambda: plain.unfused_score_backward(x))  # fmt: skip
    scores = forward()

    def choose():
        return indexer_topk.forward(CARRIER, scores, plain.CHOSEN, plain.RATIO)

    def masked():
        complete = (torch.arange(tokens, device="cuda") + 1) // plain.RATIO
        return scores.masked_fill(torch.arange(groups, device="cuda") >= complete.reshape(1, -1, 1), float("-inf"))

    def check_choice():
        """0.0 where the last queries chose what a stable sort chooses, all of them."""
        order = masked()[:, -SAMPLE:].sort(dim=-1, descending=True, stable=True)[1][..., : plain.CHOSEN].sort(-1)[0]
        return 0.0 if torch.equal(order.int(), choose()[:, -SAMPLE:]) else float("nan")

    read = 4.0 * sum((i + 1) // plain.RATIO for i in range(tokens))  # bytes of complete entries
    yield Case(f"indexer choice, {tokens}", choose, "bytes", read + 4.0 * tokens * plain.CHOSEN, check_choice, 0.0,
               lambda: masked().topk(plain.CHOSEN)[1])  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    """``quick``: 4096 tokens only."""
    for tokens in (4096,) if quick else (4096, 16384):
        yield from attention(tokens)
        yield from indexer(tokens)
