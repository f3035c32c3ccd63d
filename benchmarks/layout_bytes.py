"""Bytes that the ranks of a layout send in a step, all together: what ours send, and the least that would do.

Formulas of sizes, by kind of group as in ``paddledsv4.distributed.topology``; ``benchmarks/parallel.py`` holds them
against what is counted. t, c, p: ranks of a group; N: tokens of the global batch; C, R, D: hidden size, rank of the
queries, head size. A sum over t ranks of n bytes costs 2 (t - 1) n, a row sent to one rank its bytes.
Left out as too small to see: token counts, gradient norms, losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb, prod

from paddledsv4.config import ModelConfig, ParallelConfig
from paddledsv4.weights.names import expert_index
from paddledsv4.weights.shards import on_slices, split_of

Shapes = Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class Job:
    """A model with the shapes of its parameters, its layout, and one step: ``tokens`` in sequences of ``length``.

    ``activation``: bytes of an activation's element; gradients take four.
    """

    model: ModelConfig
    shapes: Shapes
    parallel: ParallelConfig
    tokens: int
    length: int
    activation: int = 4

    @property
    def ratios(self) -> list[int]:
        """Of every layer, those of MTP included."""
        model = self.model
        return [model.layer_ratio(i) for i in range(model.num_hidden_layers + model.num_nextn_predict_layers)]

    @property
    def heads(self) -> int:
        """How often the embedding and the head are used: by the model and by every MTP depth."""
        return 1 + self.model.num_nextn_predict_layers


def sent(job: Job) -> dict[str, float]:
    """What ours send."""
    return _present({"tensor": _tensor(job), "context": _context(job), "expert": _expert(job), **_gradients(job)})


def least(job: Job) -> dict[str, float]:
    """The least that the same split of the computation has to send."""
    return _present({
        "tensor": _tensor_least(job), "context": _context_least(job), "expert": _expert_least(job), **_gradients(job),
    })  # fmt: skip


def _present(parts: dict[str, float]) -> dict[str, float]:
    return {kind: size for kind, size in parts.items() if size}


def _gradients(job: Job) -> dict[str, float]:
    """Sums of float32 gradients over the ranks that share a parameter, once a step."""
    layout, found = job.parallel, {"replicas": 0.0, "expert_data": 0.0}
    for name, shape in job.shapes.items():
        size = 4.0 * prod(shape)
        if expert_index(name) is not None and layout.expert > 1:
            copies = layout.world_size / layout.expert
            found["expert_data"] += 2 * (copies - 1) * size  # groups together hold every expert once
        else:
            groups = 1 if split_of(name) else layout.tensor
            found["replicas"] += 2 * (layout.data * layout.context - 1) * size * groups
    return found


def _expert(job: Job) -> float:
    """One row per token and chosen expert elsewhere, there and back, forward and backward, with its probability."""
    model, p = job.model, job.parallel.expert
    row = 4 * model.hidden_size * job.activation + 2 * 4
    return len(job.ratios) * job.tokens * model.num_experts_per_tok * (p - 1) / p * row


def _expert_least(job: Job) -> float:
    """One row per token and rank with any of its experts: k of E at random miss the E/p of a rank with probability
    C(E - E/p, k) / C(E, k)."""
    model, p = job.model, job.parallel.expert
    experts, k = model.n_routed_experts, model.num_experts_per_tok
    hit = 1 - comb(experts - experts // p, k) / comb(experts, k)
    return len(job.ratios) * job.tokens * (p - 1) * hit * 4 * model.hidden_size * job.activation


def _tensor(job: Job) -> float:
    """Sums of an activation: leaving attention, experts and embedding; of a gradient: entering experts and head, and
    where computations that every rank repeats enter split ones (query rank, KV, entries, probabilities)."""
    model, t = job.model, job.parallel.tensor
    wide = _tensor_passages(job) + len(job.ratios) * model.n_routed_experts
    small = 3 * job.heads + sum(min(model.index_topk, job.length // 4) for r in job.ratios if r == 4)
    sequence = 0.0
    if job.parallel.sequence_parallel:  # attention gathers what is at rest; gradients of what was sliced are summed
        sequence = (t - 1) * len(job.ratios) * job.tokens * model.hidden_size * job.activation
        replicas = job.parallel.data * job.parallel.context
        sequence += 2 * (t - 1) * replicas * 4.0 * sum(prod(s) for name, s in job.shapes.items() if on_slices(name))
    return 2 * (t - 1) * job.tokens * (wide * job.activation + small * 4) + sequence


def _tensor_passages(job: Job) -> float:
    model = job.model
    entries = sum(model.head_dim / r for r in job.ratios if r)
    attention = len(job.ratios) * (model.hidden_size + model.q_lora_rank + model.head_dim) + entries
    experts, ends = 2 * len(job.ratios) * model.hidden_size, 2 * job.heads * model.hidden_size
    return attention + experts + ends


def _tensor_least(job: Job) -> float:
    """The same passages but for the probabilities and the indexer's targets, which could stay where they are."""
    wide = _tensor_passages(job) * job.activation + 3 * job.heads * 4
    return 2 * (job.parallel.tensor - 1) * job.tokens * wide


def _context(job: Job) -> float:
    """The window before a slice, the groups that its border cuts, and every entry to every rank; gradients back."""
    return _slices(job, job.parallel.context - 1.0)


def _context_least(job: Job) -> float:
    """As above, but entries to later slices only."""
    return _slices(job, (job.parallel.context - 1) / 2)


def _slices(job: Job, ranks_per_entry: float) -> float:
    model, c, values = job.model, job.parallel.context, 0.0
    piece = job.length // c
    for ratio in job.ratios:
        values += (c - 1) * min(model.sliding_window - 1, piece) * model.head_dim
        if ratio and job.length >= ratio:
            widths = [model.head_dim, *([model.index_head_dim] if ratio == 4 else [])]
            values += ranks_per_entry * (job.length // ratio) * sum(widths)
            factor, cut = (2, ratio + piece % ratio) if ratio == 4 else (1, piece % ratio)
            values += (c - 1) * cut * 2 * factor * sum(widths)
    return 2 * values * job.activation * job.tokens / job.length
