"""Does the softmax with a sink, and its backward, work on this machine? Run alone, it prints a table:

    python tests/single_card_tests/ops/test_attention_sink.py

Every variant of sparse attention in float32 against the definition in float64, values and gradients, where backends
go wrong: rows that no compressed entry serves, a sink that takes all or nothing, maxima that tie, large scores.
Exit code 1: some variant is off, or gave NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from paddledsv4.host import prepare_host

prepare_host()

import paddle  # noqa: E402

from paddledsv4.numerics.function import differentiable  # noqa: E402
from paddledsv4.numerics.registry import OPS, load_all  # noqa: E402

load_all()
ROWS, BATCH, HEADS, D, WINDOW, RATIO, SCALE = 22, 2, 3, 8, 4, 4, 0.35
NAMES = ("out", "dq", "dkv", "dcompressed", "dsink")
BOUND = dict.fromkeys(NAMES, 1e-5)


@dataclass
class Case:
    """query [s, b, H, D], kv [s, b, D], compressed [g, b, D], selected [b, s, K] (-1: none) or None for all complete
    entries, sink [H], and the gradient of the output [s, b, H*D]."""

    query: np.ndarray
    kv: np.ndarray
    compressed: np.ndarray
    selected: np.ndarray | None
    sink: np.ndarray
    dout: np.ndarray


def ordinary(seed: int = 0) -> Case:
    rng, groups = np.random.default_rng(seed), ROWS // RATIO
    query, kv = rng.standard_normal((ROWS, BATCH, HEADS, D)), rng.standard_normal((ROWS, BATCH, D))
    selected = np.full((BATCH, ROWS, 3), -1, np.int32)
    for i in range(ROWS):
        complete = (i + 1) // RATIO
        for b in range(BATCH):
            chosen = rng.permutation(complete)[:3]
            selected[b, i, : len(chosen)] = chosen
    compressed, sink = rng.standard_normal((groups, BATCH, D)), rng.standard_normal(HEADS)
    arrays = (query, kv, compressed, sink, rng.standard_normal((ROWS, BATCH, HEADS * D)))
    query, kv, compressed, sink, dout = (x.astype(np.float32) for x in arrays)
    return Case(query, kv, compressed, selected, sink, dout)


def changed(**changes: Callable) -> Case:
    case = ordinary()
    for name, change in changes.items():
        setattr(case, name, np.ascontiguousarray(change(getattr(case, name)), getattr(case, name).dtype))
    return case


def some_rows_masked(selected):
    selected[:, 5:15] = -1
    return selected


def all_entries() -> Case:
    case = ordinary()
    case.selected = None
    return case


CASES = {
    "ordinary": ordinary,
    "all complete entries": all_entries,
    "rows without a compressed entry": lambda: changed(selected=some_rows_masked),
    "no row has a compressed entry": lambda: changed(selected=lambda x: np.full_like(x, -1)),
    "the sink takes almost all": lambda: changed(sink=lambda x: x + 12.0),
    "the sink takes all": lambda: changed(sink=lambda x: x + 300.0),
    "the sink takes nothing": lambda: changed(sink=lambda x: x - 300.0),
    "all keys tie": lambda: changed(
        kv=lambda x: np.broadcast_to(x[:1], x.shape), compressed=lambda x: np.broadcast_to(ordinary().kv[:1], x.shape)
    ),
    "keys and sink tie": lambda: changed(query=np.zeros_like, sink=np.zeros_like),
    "large scores": lambda: changed(query=lambda x: x * 60.0),
}


def definition(case: Case) -> dict[str, np.ndarray]:
    """out = sum_k p_k key_k with p = exp(score) / (sum exp(score) + exp(sink)), and its gradients, in float64."""
    query, kv, compressed, sink, dout = (
        x.astype(np.float64) for x in (case.query, case.kv, case.compressed, case.sink, case.dout)
    )
    dout = dout.reshape(query.shape)
    out, dq, dkeys = np.zeros_like(query), np.zeros_like(query), np.zeros((ROWS + len(compressed), BATCH, D))
    dsink, keys = np.zeros(HEADS), np.concatenate([kv, compressed])
    for i in range(ROWS):
        for b in range(BATCH):
            entries = range((i + 1) // RATIO) if case.selected is None else case.selected[b, i]
            seen = [*range(max(i - WINDOW + 1, 0), i + 1), *(ROWS + c for c in entries if c >= 0)]
            k = keys[seen, b]
            for h in range(HEADS):
                scores = k @ query[i, b, h] * SCALE
                top = max(scores.max(), sink[h])
                e, e_sink = np.exp(scores - top), np.exp(sink[h] - top)
                p, p_sink = e / (e.sum() + e_sink), e_sink / (e.sum() + e_sink)
                out[i, b, h] = p @ k
                dp = k @ dout[i, b, h]
                ds = p * (dp - p @ dp)
                dq[i, b, h] = ds @ k * SCALE
                np.add.at(dkeys, (seen, b), np.outer(ds, query[i, b, h]) * SCALE + np.outer(p, dout[i, b, h]))
                dsink[h] -= p_sink * (p @ dp)
    out = out.reshape(ROWS, BATCH, -1)
    return dict(zip(NAMES, (out, dq, dkeys[:ROWS], dkeys[ROWS:], dsink), strict=True))


def computed(function: Callable, case: Case) -> dict[str, np.ndarray]:
    """The same by a variant, in float32."""
    leaves = [paddle.to_tensor(x, stop_gradient=False) for x in (case.query, case.kv, case.compressed, case.sink)]
    query, kv, compressed, sink = leaves
    selected = None if case.selected is None else paddle.to_tensor(case.selected)
    out = function(query, kv, compressed, selected, sink, window=WINDOW, ratio=RATIO, scale=SCALE)
    out.backward(paddle.to_tensor(case.dout))
    gradients = [np.zeros(x.shape, np.float32) if x.grad is None else x.grad.numpy() for x in leaves]
    return dict(zip(NAMES, (out.numpy(), *gradients), strict=True))


def errors(function: Callable, case: Case) -> dict[str, float]:
    """Largest error of every result, relative to its largest element (or 1e-3 if that is less); NaN is infinite."""
    ours, exact = computed(function, case), definition(case)
    found = {n: float(np.abs(ours[n] - exact[n]).max() / max(np.abs(exact[n]).max(), 1e-3)) for n in NAMES}
    return {name: error if np.isfinite(error) else float("inf") for name, error in found.items()}


def failures(function: Callable) -> list[str]:
    return [
        f"{case}: {name} is off by {error:.1e}"
        for case, make in CASES.items()
        for name, error in errors(function, make()).items()
        if not error <= BOUND[name]
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", [v.name for v in OPS["sparse_attention"].variants.values() if not v.missing()])
def test_sink(variant, case):
    if variant == "torch":
        pytest.importorskip("torch", reason="the torch variant needs paddledsv4[torch]")
    for name, error in errors(OPS["sparse_attention"].variants[variant].function, CASES[case]()).items():
        assert error <= BOUND[name], f"{name} is off by {error:.1e}"


WRONG = {
    "the sink's gradient forgotten": lambda dq, dkv, dc, ds: (dq, dkv, dc, ds * 0.0),
    "a gradient without its scale": lambda dq, dkv, dc, ds: (dq / SCALE, dkv, dc, ds),
    "keys off by a thousandth": lambda dq, dkv, dc, ds: (dq, dkv * 1.001, dc, ds),
    "NaN in one masked row": lambda dq, dkv, dc, ds: (dq, dkv, paddle.where(dc == dc[0, 0, 0], dc / 0.0 * 0.0, dc), ds),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_backward_is_found(how):
    right = OPS["sparse_attention"].variants["paddle"].function

    @differentiable
    def planted(query, kv, compressed, selected, sink, **static):
        out, backward = right.forward_and_backward(query, kv, compressed, selected, sink, **static)

        def wrong(dy):
            dq, dkv, dc, *index, ds = backward(dy)
            dq, dkv, dc, ds = WRONG[how](dq, dkv, dc, ds)
            return dq, dkv, dc, *index, ds

        return out, wrong

    assert failures(planted) and not failures(right)


def main() -> int:
    """Print the worst error of every result per variant; 1 if a bound is broken."""
    from rich.console import Console
    from rich.table import Table

    table, broken = Table("variant", *NAMES, title="sparse attention with a sink: worst relative error"), []
    for name, variant in OPS["sparse_attention"].variants.items():
        if missing := variant.missing():
            table.add_row(name, missing)
            continue
        worst = dict.fromkeys(NAMES, 0.0)
        for case, make in CASES.items():
            for what, error in errors(variant.function, make()).items():
                worst[what] = max(worst[what], error)
                if not error <= BOUND[what]:
                    broken.append(f"{name}, {case}: {what} is off by {error:.1e}, more than {BOUND[what]:.0e}")
        table.add_row(name, *(f"{'' if worst[what] <= BOUND[what] else '! '}{worst[what]:.1e}" for what in NAMES))
    Console().print(table)
    print("\n".join(broken) or "every variant agrees with the definition")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
