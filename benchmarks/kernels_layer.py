"""Peak memory and time of a whole layer, forward and backward: attention, hyper-connections and packed experts.

One layer at ratio 4 with frozen MXFP4 experts, once on the fused kernels and once on the same operations in plain torch
(benchmarks/kernels_*_plain.py and kernels_attn_torch.py). Linear layers are torch's in both. What is reported is beyond
the parameters and the input. The indexer chooses entries; its own loss is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_case import relative_error
from benchmarks.kernel_timing import clean

EPS, LIMIT, STREAMS, ITERATIONS = 1e-6, 10.0, 4, 20


@dataclass(frozen=True)
class Sizes:
    """Those of DeepSeek-V4-Flash."""

    hidden: int = 4096
    heads: int = 64
    head_dim: int = 512
    rotary: int = 64
    q_rank: int = 1024
    groups: int = 8
    o_rank: int = 1024
    window: int = 128
    ratio: int = 4
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    experts: int = 256
    chosen: int = 6
    each: int = 2048


@dataclass
class Layer:
    """Parameters by name, in bfloat16 or, where the model has them so, float32; and the packed experts."""

    sizes: Sizes
    device: str = "cuda"
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        z, n = self.sizes, STREAMS
        width, low = z.heads * z.head_dim, z.groups * z.o_rank
        gates = n * n + 2 * n
        self.add(q_down=(z.q_rank, z.hidden), q_up=(width, z.q_rank), kv=(z.head_dim, z.hidden),
                 o_group=(z.groups, z.o_rank, width // z.groups), out=(z.hidden, low),
                 c_kv=(2 * z.head_dim, z.hidden), c_gate=(2 * z.head_dim, z.hidden),
                 i_q=(z.index_heads * z.index_dim, z.q_rank), i_weights=(z.index_heads, z.hidden),
                 i_kv=(2 * z.index_dim, z.hidden), i_gate=(2 * z.index_dim, z.hidden),
                 router=(z.experts, z.hidden),
                 shared_1=(2 * z.each, z.hidden), shared_2=(z.hidden, z.each))  # fmt: skip
        self.add(torch.float32, c_ape=(z.ratio, 2 * z.head_dim), i_ape=(z.ratio, 2 * z.index_dim), sink=(z.heads,))
        mapping = {"mapping": (gates, n * z.hidden), "bias": (gates,), "pre": (1,), "post": (1,), "res": (1,)}
        for block in ("attention", "experts"):
            self.add(torch.float32, **{f"{block}_{name}": shape for name, shape in mapping.items()})
        norms = {"norm_1": z.hidden, "norm_2": z.hidden, "q_norm": z.q_rank, "kv_norm": z.head_dim,
                 "c_norm": z.head_dim, "i_norm": z.index_dim}  # fmt: skip
        for name, size in norms.items():
            self.parameters[name] = torch.ones(size, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        for name, out, width in (("fc1", 2 * z.each, z.hidden), ("fc2", z.hidden, z.each)):
            codes = torch.randint(256, (z.experts, out, width // 2), dtype=torch.uint8, device=self.device)
            self.packed[name] = codes, torch.full_like(codes[..., : width // 32], 119).contiguous()

    def add(self, dtype=torch.bfloat16, **shapes):
        for name, shape in shapes.items():
            values = torch.randn(shape, device=self.device) * shape[-1] ** -0.5
            self.parameters[name] = values.to(dtype).requires_grad_()

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self.__dict__["parameters"][name]
        except KeyError:
            raise AttributeError(name) from None


def run(ops: Any, p: Layer, streams: torch.Tensor) -> torch.Tensor:
    """streams [tokens, 4 C] -> the same."""
    for block, inner in (("attention", attention), ("experts", experts)):
        proj, r = ops.project(streams, getattr(p, f"{block}_mapping"))
        alphas = [getattr(p, f"{block}_{name}") for name in ("pre", "post", "res")]
        h_pre, h_post, logits = ops.gates(proj, r, *alphas, getattr(p, f"{block}_bias"))
        h_res = ops.sinkhorn(logits.view(-1, STREAMS, STREAMS))
        x = ops.rms_norm(ops.aggregate(streams, h_pre), p.norm_1 if block == "attention" else p.norm_2)
        streams = ops.mix(h_res, streams, h_post, inner(ops, p, x))
    return streams


def attention(ops: Any, p: Layer, x: torch.Tensor) -> torch.Tensor:
    z, tokens = p.sizes, len(x)
    speeds = 1e-2 ** torch.linspace(0, 1, z.rotary // 2, device=x.device)
    angles = torch.arange(tokens, device=x.device)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    starts = slice(None, tokens // z.ratio * z.ratio, z.ratio)
    q_lora = ops.rms_norm(x @ p.q_down.T, p.q_norm)
    query = ops.rms_norm((q_lora @ p.q_up.T).view(-1, z.head_dim), None).view(tokens, z.heads, z.head_dim)
    query = ops.rope(query, cos, sin, False)
    kv = ops.rope(ops.rms_norm(x @ p.kv.T, p.kv_norm)[:, None], cos, sin, False)[:, 0]
    made = ops.rms_norm(ops.compress(x @ p.c_kv.T, x @ p.c_gate.T, p.c_ape, z.ratio), p.c_norm)
    compressed = ops.rope(made[:, None], cos[starts], sin[starts], False)[:, 0]
    with torch.no_grad():
        index_query = ops.rope((q_lora @ p.i_q.T).view(tokens, z.index_heads, z.index_dim), cos, sin, False)
        made = ops.rms_norm(ops.compress(x @ p.i_kv.T, x @ p.i_gate.T, p.i_ape, z.ratio), p.i_norm)
        key = ops.rope(made[:, None], cos[starts], sin[starts], False)[:, 0]
        selected = ops.select(index_query, key, x @ p.i_weights.T, z)
    out = ops.attend(query, kv, compressed, selected, p.sink, z)
    out = ops.rope(out, cos, sin, True).reshape(tokens, z.groups, -1)
    low = torch.einsum("tgd,grd->tgr", out, p.o_group)
    return low.flatten(1) @ p.out.T


def experts(ops: Any, p: Layer, x: torch.Tensor) -> torch.Tensor:
    z = p.sizes
    shared = ops.swiglu(x @ p.shared_1.T, torch.ones(len(x), device=x.device)) @ p.shared_2.T
    scores = F.softplus((x @ p.router.T).float()).sqrt()
    best, chosen = scores.topk(z.chosen)
    probs = torch.zeros_like(scores).scatter(1, chosen, best / best.sum(-1, keepdim=True))
    routing = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    rows, prob, plan = ops.permute(x, probs, routing, len(x) * z.chosen)
    hidden = ops.swiglu(ops.packed(rows, p.packed["fc1"], routing.sum(0)), prob)
    return shared + ops.unpermute(ops.packed(hidden, p.packed["fc2"], routing.sum(0)), plan, len(x))


def measured(function: Callable) -> dict[str, float]:
    """Memory at the peak beyond what was there before, and the median time of three runs."""
    function()
    clean()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "ms": median(times)}


def report(quick: bool) -> list[dict[str, Any]]:
    """Peak bytes and milliseconds of both, and how far the outputs and the input's gradients are apart."""
    from benchmarks.kernels_layer_ops import Fused, Plain

    torch.manual_seed(0)
    tokens, layer = 4096 if quick else 16384, Layer(Sizes())
    streams = torch.randn(tokens, STREAMS * layer.sizes.hidden, device="cuda").bfloat16().requires_grad_()
    dy, row, results = torch.randn_like(streams), {"tokens": tokens}, []

    def both(ops: Any) -> torch.Tensor:
        for t in (streams, *layer.parameters.values()):
            t.grad = None
        out = run(ops, layer, streams)
        out.backward(dy)
        return out.detach()

    for name, ops in (("fused", Fused()), ("unfused", Plain())):
        try:
            row[name] = measured(lambda ops=ops: both(ops))
            results.append((both(ops), streams.grad))
        except Exception as error:  # too large is a finding too
            row[name] = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
        print(f"whole layer, {tokens}, {name}: {row[name]}", flush=True)
    if len(results) == 2:
        row["apart"] = [relative_error(a, b) for a, b in zip(*results, strict=True)]
    print(f"whole layer, {tokens}: {line(row)}", flush=True)
    return [row]


def line(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {row[name]['peak_bytes'] / 2**30:.2f} GiB, {row[name]['ms']:.1f} ms" if "ms" in row[name]
        else f"{name} {row[name]['failure']}" for name in ("fused", "unfused")
    ]  # fmt: skip
    return "; ".join(parts) + (f"; output and gradient apart {row['apart'][0]:.1e}, {row['apart'][1]:.1e}"
                               if "apart" in row else "")  # fmt: skip
