"""Sparse attention and the indexer in plain torch: inputs, what an ordinary user would write, and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEADS, D, WINDOW, CHOSEN, RATIO = 64, 512, 128, 512, 4
INDEX_HEADS, INDEX_D = 64, 128
CHUNK = 512  # queries whose gathered keys are alive at a time


@dataclass
class Inputs:
    """query and dout [s, 1, H, D], kv [s, 1, D], compressed [g, 1, D], selected [1, s, K], sink [H]."""

    query: torch.Tensor
    kv: torch.Tensor
    compressed: torch.Tensor
    selected: torch.Tensor
    sink: torch.Tensor
    dout: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.kv, self.compressed, self.selected, self.sink


STATIC = {"window": WINDOW, "ratio": RATIO, "scale": D**-0.5}


def inputs(tokens: int, seed: int = 0) -> Inputs:
    """Every query chooses CHOSEN entries at random: as many everywhere, as at the end of a long document."""
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=random).bfloat16()

    groups = tokens // RATIO
    chosen = [torch.rand(min(CHUNK, tokens - i), groups, device="cuda", generator=random).topk(CHOSEN)[1].sort()[0]
              for i in range(0, tokens, CHUNK)]  # fmt: skip
    sink = torch.randn(HEADS, device="cuda", generator=random)
    return Inputs(normal(tokens, 1, HEADS, D), normal(tokens, 1, D), normal(groups, 1, D),
                  torch.cat(chosen).int().unsqueeze(0), sink, normal(tokens, 1, HEADS, D))  # fmt: skip


def pairs(tokens: int) -> int:
    """Query-key pairs: whole windows but for the first queries, and the chosen entries."""
    return tokens * (WINDOW + CHOSEN) - WINDOW * (WINDOW - 1) // 2


def key_index(selected: torch.Tensor, first: int, last: int, far: int) -> torch.Tensor:
    """[last - first, WINDOW + K]: rows of the window's keys, and ``far`` + entries behind them; -1: none."""
    row = torch.arange(first, last, device="cuda").unsqueeze(1)
    near = row - WINDOW + 1 + torch.arange(WINDOW, device="cuda")
    entries = selected[0, first:last].long()
    return torch.cat([torch.where(near >= 0, near, -1), torch.where(entries >= 0, entries + far, -1)], 1)


def attend(query: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """query [r, H, D], keys [n, D], index [r, T] -> [r, H, D]: gather, two batched products and a softmax."""
    gathered = keys[index.clamp(min=0)]
    scores = query @ gathered.transpose(1, 2) * D**-0.5
    scores = scores.masked_fill((index < 0).unsqueeze(1), float("-inf"))
    rest = sink.to(scores.dtype).reshape(1, -1, 1).expand(len(scores), -1, 1)
    return torch.cat([scores, rest], -1).softmax(-1)[..., :-1] @ gathered


def unfused_forward(x: Inputs) -> torch.Tensor:
    tokens, keys, out = x.query.shape[0], torch.cat([x.kv, x.compressed])[:, 0], torch.empty_like(x.query)
    for i in range(0, tokens, CHUNK):
        index = key_index(x.selected, i, min(i + CHUNK, tokens), tokens)
        out[i : i + CHUNK, 0] = attend(x.query[i : i + CHUNK, 0], keys, index, x.sink)
    return out


def unfused_backward(x: Inputs, dtype: torch.dtype = torch.bfloat16, rows: int | None = None):
    """Gradients of query, keys and sink by autograd, chunk by chunk; of the first ``rows`` queries."""
    tokens = x.query.shape[0]
    keys = torch.cat([x.kv, x.compressed])[:, 0].to(dtype).requires_grad_()
    sink = x.sink.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    dkeys, dsink, dquery = torch.zeros_like(keys, dtype=sink.dtype), torch.zeros_like(sink), []
    for i in range(0, rows or tokens, CHUNK):
        last = min(i + CHUNK, rows or tokens)
        query = x.query[i:last, 0].to(dtype).requires_grad_()
        out = attend(query, keys, key_index(x.selected, i, last, tokens), sink)
        dq, dk, ds = torch.autograd.grad(out, (query, keys, sink), x.dout[i:last, 0].to(dtype))
        dkeys += dk
        dsink += ds
        dquery.append(dq)
    return torch.cat(dquery), dkeys[:tokens], dkeys[tokens:], dsink


def truth(x: Inputs, first: int, last: int) -> torch.Tensor:
    """Queries ``first`` to ``last``, float64."""
    keys = torch.cat([x.kv, x.compressed])[:, 0].double()
    index = key_index(x.selected, first, last, x.query.shape[0])
    return attend(x.query[first:last, 0].double(), keys, index, x.sink.double())


@dataclass
class IndexInputs:
    """query [s, 1, h, d], key [g, 1, d], weights [s, 1, h], dscores [1, s, g] float32."""

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor
    dscores: torch.Tensor


def index_inputs(tokens: int, seed: int = 0) -> IndexInputs:
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=random)

    groups = tokens // RATIO
    query, key = normal(tokens, 1, INDEX_HEADS, INDEX_D), normal(groups, 1, INDEX_D)
    weights = normal(tokens, 1, INDEX_HEADS) * INDEX_HEADS**-0.5
    return IndexInputs(query.bfloat16(), key.bfloat16(), weights.bfloat16(), normal(1, tokens, groups))


def score(query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """query [r, h, d], key [g, d], weights [r, h] -> [r, g]; [r, h, g] is there in between."""
    raw = torch.relu(query @ key.T)
    return (raw * (weights * INDEX_D**-0.5).unsqueeze(-1)).sum(1)


def unfused_score(x: IndexInputs) -> torch.Tensor:
    chunks = [score(x.query[i : i + CHUNK, 0], x.key[:, 0], x.weights[i : i + CHUNK, 0])
              for i in range(0, x.query.shape[0], CHUNK)]  # fmt: skip
    return torch.cat(chunks).unsqueeze(0)


def unfused_score_backward(x: IndexInputs, dtype: torch.dtype = torch.bfloat16, rows: int | None = None):
    key, dkey = x.key[:, 0].to(dtype).requires_grad_(), 0.0
    dquery, dweights = [], []
    for i in range(0, rows or x.query.shape[0], CHUNK):
        query, weights = (t[i : i + CHUNK, 0].to(dtype).requires_grad_() for t in (x.query, x.weights))
        dscores = x.dscores[0, i : i + CHUNK].to(dtype)
        dq, dk, dw = torch.autograd.grad(score(query, key, weights), (query, key, weights), dscores)
        dquery.append(dq)
        dweights.append(dw)
        dkey = dkey + dk.to(torch.promote_types(dtype, torch.float32))
    return torch.cat(dquery), dkey, torch.cat(dweights)
