"""The memory-bound kernels at Flash's shapes: hyper-connections, norms, rotary, pooling, SwiGLU, permutation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import kernels_mhc_peers as peers
from benchmarks import kernels_mhc_plain as plain
from benchmarks.kernel_case import Case, worst
from benchmarks.kernel_timing import side_stream
from benchmarks.torch_carrier import CARRIER, TorchCarrier
from paddledsv4.kernels import (
    compress,
    hc_contract,
    hc_gates,
    hc_mapping,
    hc_mix,
    permute,
    rms_norm,
    rope,
    sinkhorn,
    swiglu,
)

STREAMS, HIDDEN, HEADS, HEAD, ROTARY = 4, 4096, 64, 512, 64
EXPERTS, CHOSEN, WIDTH, LIMIT, EPS = 256, 6, 2048, 10.0, 1e-6
GOAL = 0.75
Tensors = Sequence[torch.Tensor]


class Poison(TorchCarrier):
    """Memory that is NaN, or -1, where a kernel does not write."""

    def empty(self, shape, dtype, like):
        x = super().empty(shape, dtype, like)
        return x.fill_(float("nan") if x.is_floating_point() else -1)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def draw32(*shape: int) -> torch.Tensor:
    return draw(*shape, dtype=torch.float32)


def many(x) -> tuple[torch.Tensor, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def size(*tensors: torch.Tensor) -> float:
    return float(sum(x.nbytes for x in tensors))


def errors(ours: Tensors, truth: Tensors) -> float:
    """The worst relative error; those of float32 results count 100 times."""
    wide = [(a, t) for a, t in zip(ours, truth, strict=True) if a.dtype == torch.float32]
    narrow = [(a, t) for a, t in zip(ours, truth, strict=True) if a.dtype != torch.float32]
    found = ([100 * worst(wide)] if wide else []) + ([worst(narrow)] if narrow else [])
    return max(found) if all(e == e for e in found) else float("nan")


def both_ways(
    name: str,
    definition: Callable,
    inputs: Tensors,
    forward: Callable,
    backward: Callable,
    forward_peers=None,
    backward_peers=None,
    kept: Tensors | None = None,
    limit: float = 3e-3,
) -> Iterator[Case]:
    """A case for ``forward(carrier)`` and one for ``backward(carrier, *gradients)`` of ``definition(*inputs)``.

    ``backward`` gives a gradient for every input that is floating point; of the inputs it has to read ``kept``, all
    unless they are named. An output that is one of the inputs moves no bytes.
    """
    floating = [i for i, x in enumerate(inputs) if x.is_floating_point()]

    def graph_of(*tensors):
        held = [x.detach().requires_grad_() if i in floating else x for i, x in enumerate(tensors)]
        return [held[i] for i in floating], many(definition(*held))

    with torch.no_grad():
        outputs = many(definition(*inputs))
    grads = [draw(*y.shape, dtype=y.dtype) for y in outputs]

    @functools.cache
    def exact():
        leaves, truth = graph_of(*(x.double() if x.is_floating_point() else x for x in inputs))
        return [y.detach() for y in truth], torch.autograd.grad(truth, leaves, [g.double() for g in grads])

    def check_forward():
        return errors(many(forward(Poison()))[: len(outputs)], exact()[0])

    def check_backward():
        ours, again = many(backward(Poison(), *grads)), many(backward(CARRIER, *grads))
        if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
            raise AssertionError("another run gives other bits")
        return errors(ours, exact()[1])

    given = {x.data_ptr() for x in inputs}
    moved = size(*inputs, *(y for y in outputs if y.data_ptr() not in given))
    yield Case(f"{name}, forward", lambda: forward(CARRIER), "bytes", moved, check_forward, limit,
               lambda: definition(*inputs), forward_peers or {}, goal=GOAL)
    side = side_stream()
    with torch.cuda.stream(side):  # not on the default stream, so that its backward can be captured
        leaves, made = graph_of(*inputs)
    torch.cuda.synchronize()
    moved = size(*(inputs if kept is None else kept), *(x for x in inputs if x.is_floating_point()), *grads)
    yield Case(f"{name}, backward", lambda: backward(CARRIER, *grads), "bytes", moved, check_backward, limit,
               lambda: torch.autograd.grad(made, leaves, grads, retain_graph=True), backward_peers or {}, goal=GOAL)


def norms(tokens: int) -> Iterator[Case]:
    x, w, dy = draw(tokens, HIDDEN), draw(HIDDEN), draw(tokens, HIDDEN)
    yield from both_ways(
        f"rms_norm {HIDDEN}, {tokens}", plain.rms_norm, [x, w],
        lambda c: rms_norm.forward(c, x, w, EPS), lambda c, dy: rms_norm.backward(c, dy, x, w, EPS),
        {"liger": peers.liger_norm(x, w), "quack": peers.quack_norm(x, w)},
        {"liger": peers.liger_norm_backward(x, w, dy), "quack": peers.quack_norm_backward(x, w, dy)},
    )
    q, turns = draw(tokens * HEADS, HEAD), (draw32(tokens, ROTARY // 2), draw32(tokens, ROTARY // 2))
    yield from both_ways(
        f"head_norm {HEADS} x {HEAD}, {tokens}", lambda x: plain.rms_norm(x, None), [q],
        lambda c: rms_norm.forward(c, q, None, EPS), lambda c, dy: rms_norm.backward(c, dy, q, None, EPS)[:1],
    )
    q = q.view(tokens, HEADS, HEAD)
    yield from both_ways(
        f"rope {ROTARY} of {HEAD}, {HEADS} heads, {tokens}", lambda x: plain.rope(x, *many_of(turns, x)), [q],
        lambda c: rope.rotate(c, q, *turns, False), lambda c, dy: rope.rotate(c, dy, *turns, True), kept=turns,
    )


def many_of(turns: Tensors, x: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(torch.float64) if x.dtype == torch.float64 else t for t in turns]


def pooling(tokens: int) -> Iterator[Case]:
    for ratio, overlap in ((4, True), (128, False)):
        kv, score = (draw(tokens, 1, HEAD * (1 + overlap)) for _ in range(2))
        ape = draw32(ratio, HEAD * (1 + overlap))
        yield from both_ways(
            f"compress by {ratio}, {tokens}",
            lambda kv, score, ape, r=ratio, o=overlap: plain.compress(kv, score, ape, r, o), [kv, score, ape],
            lambda c, a=(kv, score, ape, ratio, overlap): compress.forward(c, *a),
            lambda c, dy, a=(kv, score, ape, ratio, overlap): compress.backward(c, dy, *a),
        )


def experts(tokens: int) -> Iterator[Case]:
    rows = tokens * CHOSEN
    x, prob = 4 * draw(rows, 2 * WIDTH), torch.rand(rows, device="cuda")
    dy = draw(rows, WIDTH)
    yield from both_ways(
        f"swiglu {WIDTH} x probability, {rows}", plain.swiglu, [x, prob],
        lambda c: swiglu.forward(c, x, prob, LIMIT), lambda c, dy: swiglu.backward(c, dy, x, prob, LIMIT),
        {"liger (no clamp, no probability)": peers.liger_swiglu(x)},
        {"liger (no clamp, no probability)": peers.liger_swiglu_backward(x, dy)},
    )
    del x, dy
    chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(CHOSEN, -1).indices
    routing = torch.zeros(tokens, EXPERTS, dtype=torch.bool, device="cuda").scatter_(1, chosen, True)
    x, probs = draw(tokens, HIDDEN), draw32(tokens, EXPERTS)
    flat, token, starts, lists, by_expert = permute.assign(CARRIER, probs, routing, rows)

    def forward(c):
        flat, _, starts, lists, _ = permute.assign(c, probs, routing, rows)
        return permute.spread(c, x, starts, lists), flat

    def backward(c, drows, dflat):
        return permute.gather(c, drows, starts, lists), permute.probs_backward(c, dflat, routing, by_expert)

    yield from both_ways(f"permute top-{CHOSEN} of {EXPERTS}, {tokens}", plain.permute, [x, probs, routing],
                         forward, backward, kept=[routing])
    y = draw(rows, HIDDEN)
    yield from both_ways(
        f"unpermute top-{CHOSEN}, {tokens}", lambda rows, token: plain.unpermute(rows, token, tokens), [y, token],
        lambda c: permute.gather(c, y, *permute.invert(c, token, tokens)),
        lambda c, dout: permute.spread(c, dout, starts, lists), kept=[token],
    )


def connections(tokens: int) -> Iterator[Case]:
    n, gates = STREAMS, STREAMS**2 + 2 * STREAMS
    x, o, w = draw(tokens, n * HIDDEN), draw(tokens, HIDDEN), draw32(gates, n * HIDDEN) / 128
    proj, r, root = hc_mapping.project(CARRIER, x, w, EPS)
    yield from both_ways(
        f"hc_project {gates} of {n} x {HIDDEN}, {tokens}", plain.project, [x, w],
        lambda c: hc_mapping.project(c, x, w, EPS),
        lambda c, dproj, dr: hc_mapping.project_backward(c, dproj, dr, x, w, r, root),
    )
    alphas, bias = [draw32(1) for _ in range(3)], draw32(gates)
    yield from both_ways(
        f"hc_gates, {tokens}", plain.gates, [proj, r, *alphas, bias],
        lambda c: hc_gates.forward(c, proj, r, alphas, bias, n, EPS, "bfloat16"),
        lambda c, *g: flatten(hc_gates.backward(c, *g, proj, r, alphas, bias, n)),
    )
    logits = draw32(tokens, n, n)
    yield from both_ways(
        f"sinkhorn 20, {tokens}", plain.sinkhorn, [logits],
        lambda c: sinkhorn.forward(c, logits, 20, EPS, "bfloat16"),
        lambda c, dy: sinkhorn.backward(c, dy, logits, 20, EPS),
        {"tile-kernels": peers.tile_sinkhorn(logits)}, {"tile-kernels": peers.tile_sinkhorn_backward(logits)},
    )
    h_pre, h_post, h_res = draw(tokens, n).abs(), draw(tokens, n), draw(tokens, n, n)
    yield from both_ways(
        f"hc_aggregate, {tokens}", plain.aggregate, [x, h_pre],
        lambda c: hc_mix.aggregate(c, x, h_pre), lambda c, dy: hc_mix.aggregate_backward(c, dy, x, h_pre),
        {"tile-kernels": peers.tile_aggregate(x, h_pre)},
        {"tile-kernels": peers.tile_aggregate_backward(x, h_pre)},
    )
    yield from both_ways(
        f"hc_mix, {tokens}", plain.mix, [h_res, x, h_post, o],
        lambda c: hc_mix.mix(c, h_res, x, h_post, o), lambda c, dy: hc_mix.mix_backward(c, dy, h_res, x, h_post, o),
        {"tile-kernels": peers.tile_mix(h_res, x, h_post, o)},
        {"tile-kernels": peers.tile_mix_backward(h_res, x, h_post, o)},
    )
    fn, base, scale = draw32(n, n * HIDDEN) / 128, draw32(n), draw32(1)
    made = hc_contract.forward(CARRIER, x, fn, base, scale, EPS)
    yield from both_ways(
        f"hc_contract, {tokens}", plain.contract, [x, fn, base, scale],
        lambda c: (hc_contract.forward(c, x, fn, base, scale, EPS)[0], x),
        lambda c, dy, dx: hc_contract.backward(c, dy, dx, x, fn, base, scale, *made[1:], EPS),
    )


def flatten(gradients) -> tuple[torch.Tensor, ...]:
    dproj, dr, dalphas, dbias = gradients
    return dproj, dr, *dalphas, dbias


def cases(quick: bool) -> Iterator[Case]:
    """Sequences of 4096 tokens and, unless ``quick``, of 16384."""
    for tokens in (4096,) if quick else (4096, 16384):
        for family in (norms, pooling, experts, connections):
            torch.manual_seed(0)
            yield from family(tokens)
