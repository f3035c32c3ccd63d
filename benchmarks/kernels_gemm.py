"""The fused head and loss, and the products of experts on MXFP4 weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from benchmarks.grouped_gemm import grouped_gemm
from benchmarks.kernel_case import Case, worst
from benchmarks.torch_carrier import CARRIER
from paddledsv4.kernels import head_gradients, linear_cross_entropy, packed_linear

HIDDEN, VOCABULARY = 4096, 129280
EXPERTS, EACH, CHOSEN = 256, 2048, 6
TOKENS, WORDS = slice(0, 64), slice(1000, 1256)  # of which gradients are checked


def cases(quick: bool) -> Iterator[Case]:
    for tokens in (4096,) if quick else (4096, 16384):
        yield from head(tokens)
        yield from experts(tokens)


class Head:
    """Inputs of the head and its loss, and the truth in float64 of some of its results."""

    def __init__(self, tokens: int):
        torch.manual_seed(tokens)
        self.x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.weight = 0.02 * torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.labels = torch.randint(VOCABULARY, (tokens,), device="cuda")
        self.dloss = torch.rand(tokens, device="cuda") / tokens
        self.losses, self.logs = linear_cross_entropy.forward(CARRIER, self.x, self.weight, self.labels)

    def forward(self):
        return linear_cross_entropy.forward(CARRIER, self.x, self.weight, self.labels)

    def backward(self):
        return linear_cross_entropy.backward(CARRIER, self.dloss, self.x, self.weight, self.labels, self.logs)

    def both(self):
        losses, logs = self.forward()
        return losses, *linear_cross_entropy.backward(CARRIER, self.dloss, self.x, self.weight, self.labels, logs)

    def at_once(self):
        return head_gradients.losses_and_gradients(CARRIER, self.x, self.weight, self.labels, self.dloss)

    @cached_property
    def truth(self) -> tuple[torch.Tensor, ...]:
        """All losses, dx of some tokens, dW of some words, in float64."""
        losses, dx, dw, weight = [], None, 0.0, self.weight.double()
        for at in range(0, len(self.x), 1024):
            part = slice(at, at + 1024)
            x, label = self.x[part].double(), self.labels[part, None]
            logits = x @ weight.T
            log = torch.logsumexp(logits, -1, keepdim=True)
            losses.append((log - logits.gather(1, label))[:, 0])
            g = (logits - log).exp_()
            g.scatter_add_(1, label, torch.full_like(label, -1, dtype=g.dtype)).mul_(self.dloss[part, None])
            dx = g[TOKENS] @ weight if dx is None else dx
            dw = dw + g[:, WORDS].T @ x
        return torch.cat(losses), dx, dw

    def check(self, function) -> float:
        (losses, dx, dw), found = self.truth, function()
        if function == self.forward:
            return worst([(found[0], losses)])
        return worst([(found[-2][TOKENS], dx), (found[-1][WORDS], dw)])

    def leaves(self):
        return self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def trained(self, losses_of):
        """Forward and backward of a library: ``losses_of(x, weight)`` gives losses, or their mean."""
        x, weight = self.leaves()

        def run():
            x.grad = weight.grad = None
            losses = losses_of(x, weight)
            losses.backward(self.dloss.to(losses.dtype) if losses.ndim else None)

        return run

    def liger(self, reduction: str):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        return self.trained(lambda x, weight: loss(weight, x, self.labels))

    def cce(self, epsilon):
        from cut_cross_entropy import linear_cross_entropy as cce

        return self.trained(lambda x, weight: cce(x, weight, self.labels, reduction="none", filter_eps=epsilon))

    def cce_forward(self):
        from cut_cross_entropy import linear_cross_entropy as cce

        return lambda: cce(self.x, self.weight, self.labels, reduction="none")

    def quack(self):
        from quack.linear_cross_entropy import ChunkedLinearCrossEntropyFunction as Chunked

        return self.trained(lambda x, weight: Chunked.apply(x, weight, self.labels, -100, "mean", 4096, False))


def head(tokens: int) -> Iterator[Case]:
    h, product = Head(tokens), 2.0 * tokens * HIDDEN * VOCABULARY
    yield Case(
        f"linear cross-entropy, forward, {tokens}", h.forward, "flops", product, lambda: h.check(h.forward), 1e-4,
        unfused=lambda: F.cross_entropy(h.x @ h.weight.T, h.labels, reduction="none"),
        peers={"cut-cross-entropy": h.cce_forward},
    )
    yield Case(f"linear cross-entropy, backward, {tokens}", h.backward, "flops", 2 * product,
               lambda: h.check(h.backward), 1e-2)
    # With a weight for every token that is known only when the gradient comes, and with one known beforehand.
    late = {"liger none": lambda: h.liger("none"), "cut-cross-entropy, exact": lambda: h.cce(None),
            "cut-cross-entropy, filtered": lambda: h.cce("auto")}  # fmt: skip
    early = {"liger mean": lambda: h.liger("mean"), "quack mean": h.quack}
    for name, function, peers in (("both", h.both, late), ("both at once", h.at_once, early)):
        yield Case(
            f"linear cross-entropy, {name}, {tokens}", function, "flops", 3 * product, partial(h.check, function), 1e-2,
            unfused=h.trained(lambda x, weight: F.cross_entropy(x @ weight.T, h.labels, reduction="none")),
            peers=peers, alone=frozenset({"quack mean"}), graph=False, goal=1.0, rival="fastest peer",
        )


class Experts:
    """Ragged groups of rows, two of them empty, with a packed weight an expert and the same unpacked."""

    def __init__(self, tokens: int, out: int, width: int):
        torch.manual_seed(tokens + width)
        shares = torch.distributions.Dirichlet(torch.full((EXPERTS,), 8.0)).sample()
        shares[[7, 200]] = 0.0
        self.counts = torch.bincount(torch.multinomial(shares, tokens * CHOSEN, True), minlength=EXPERTS).cuda()
        self.sizes, self.out, self.width = self.counts.tolist(), out, width
        self.ends = self.counts.cumsum(0).to(torch.int32)
        self.starts = F.pad(self.ends, (1, 0))
        self.x, self.dy = (torch.randn(tokens * CHOSEN, n, device="cuda", dtype=torch.bfloat16) for n in (width, out))
        self.packed = torch.randint(256, (EXPERTS, out, width // 2), dtype=torch.uint8, device="cuda")
        self.scales = torch.randint(110, 125, (EXPERTS, out, width // 32), dtype=torch.uint8, device="cuda")
        self.addresses = [t.data_ptr() + torch.arange(EXPERTS, device="cuda") * t[0].numel()
                          for t in (self.packed, self.scales)]
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device="cuda")
        self.values = torch.cat([magnitudes, -magnitudes])
        self.unpacked = torch.stack([self.unpack(e) for e in range(EXPERTS)])

    def unpack(self, e: int) -> torch.Tensor:
        codes = self.packed[e].int()
        pairs = torch.stack([self.values[codes & 15], self.values[codes >> 4]], -1)
        factors = torch.exp2(self.scales[e].float() - 127)
        return (pairs.view(self.out, -1, 32) * factors[..., None]).view(self.out, self.width).bfloat16()

    def forward(self):
        return packed_linear.forward(CARRIER, self.x, *self.addresses, self.counts, self.out)

    def backward(self):
        return packed_linear.input_gradient(CARRIER, self.dy, *self.addresses, self.counts, self.width)

    def check(self, back: bool) -> float:
        """The rows of eight experts, the largest and an empty one among them."""
        found = self.backward() if back else self.forward()
        pairs = []
        for e in (0, 3, 7, 31, 100, 199, 255, max(range(EXPERTS), key=self.sizes.__getitem__)):
            rows, weight = slice(self.starts[e], self.ends[e]), self.unpacked[e].double()
            if self.sizes[e]:
                truth = self.dy[rows].double() @ weight if back else self.x[rows].double() @ weight.T
                pairs.append((found[rows], truth))
        return worst(pairs)

    def unfused(self, back: bool):
        """Expert by expert: unpack, multiply."""
        rows = (self.dy if back else self.x).split(self.sizes)
        parts = (part @ (self.unpack(e) if back else self.unpack(e).T) for e, part in enumerate(rows))
        return torch.cat(list(parts))

    def torch_grouped(self, back: bool):
        rows, weight = (self.dy, self.unpacked) if back else (self.x, self.unpacked.transpose(1, 2))
        return lambda: torch._grouped_mm(rows, weight, offs=self.ends)

    def triton_grouped(self, back: bool):
        rows = self.dy if back else self.x
        return lambda: grouped_gemm(rows, self.unpacked, self.starts, max(self.sizes), back)


def experts(tokens: int) -> Iterator[Case]:
    for layer, out, width in (("fc1", 2 * EACH, HIDDEN), ("fc2", HIDDEN, EACH)):
        group = Experts(tokens, out, width)
        yield product(group, f"mxfp4 grouped {layer}, forward, {tokens}", back=False)
        yield product(group, f"mxfp4 grouped {layer}, input gradient, {tokens}", back=True)
        del group


def product(e: Experts, name: str, back: bool) -> Case:
    return Case(
        name, e.backward if back else e.forward, "flops", 2.0 * len(e.x) * e.out * e.width, lambda: e.check(back), 5e-3,
        unfused=lambda: e.unfused(back),
        peers={"bf16 grouped, torch": lambda: e.torch_grouped(back),
               "bf16 grouped, Triton": lambda: e.triton_grouped(back)},
        goal=0.6, rival="fastest peer",
    )  # fmt: skip
