"""Queries without keys, sinks of any size, entries that nobody chose: sparse attention stays exact and finite.

Each trap is also set in a naive version, and the check that ours passes must find it there.
"""

import numpy as np
import paddle
import pytest
from nan_traps import array, assert_finite, function, golden, leaf, variants
from reference import relative_error

from paddledsv4.ops import sparse_attention
from paddledsv4.ops.attention_segments import Selected

ROWS, BATCH, HEADS, D, ENTRIES = 22, 2, 3, 8, 5
NAMES = ("out", "dq", "dkv", "dcompressed", "dsink")
DTYPES = ["float32", "float64", "bfloat16"]
SINKS = {"-inf": -np.inf, "-3e38": -3e38, "-1e30": -1e30, "0": 0.0, "1e30": 1e30, "3e38": 3e38}
every_variant = pytest.mark.parametrize("variant", variants("sparse_attention"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attend(call, dtype="float32", sink=0.5, window=0, selected=None, offset=0, poison=None, seed=0):
    """Results and gradients of random queries, with ``selected`` [b, s, K] or every complete entry (None).

    ``poison``: value of the first and the last compressed entry.
    """
    paddle.seed(seed)
    query, kv = paddle.randn([ROWS, BATCH, HEADS, D]), paddle.randn([ROWS, BATCH, D])
    compressed, dout = paddle.randn([ENTRIES, BATCH, D]), paddle.randn([ROWS, BATCH, HEADS * D])
    if poison is not None:
        compressed[0], compressed[-1] = poison, poison
    inputs = [leaf(x, dtype) for x in (query, kv, compressed)]
    sink = leaf(paddle.full([HEADS], sink), "float64" if dtype == "float64" else "float32")
    index = None if selected is None else paddle.to_tensor(selected, "int32")
    out = call(*inputs, index, sink, window=window, ratio=4, scale=0.35, offset=offset)
    assert out.dtype == inputs[0].dtype
    out.backward(dout.astype(out.dtype))
    assert all(x.grad is None or x.grad.dtype == x.dtype for x in (*inputs, sink))
    grads = [np.zeros(x.shape) if x.grad is None else array(x.grad) for x in (*inputs, sink)]
    return dict(zip(NAMES, (array(out), *grads), strict=True))


def nothing_selected(rows=slice(None)) -> np.ndarray:
    """Entries 1 and 3 for every query, but none for ``rows``."""
    selected = np.broadcast_to(np.array([1, -1, 3]), (BATCH, ROWS, 3)).copy()
    selected[:, rows] = -1
    return selected


def without_keys(call, dtype, sink, least=0.0) -> None:
    """Some queries have no key, then none has any; chosen entries and causal ones. ``least``: what gradients of such
    queries may be."""
    some = attend(call, dtype, sink, selected=nothing_selected(slice(4, 9)))
    assert_finite(**some)
    assert (some["out"][4:9] == 0).all() and np.abs(some["dq"][4:9]).max() <= least
    assert sink > 1e20 or np.abs(some["out"][:4]).min() > 0
    for none in (attend(call, dtype, sink, selected=nothing_selected()),
                 attend(call, dtype, sink, selected=None, window=0)):
        assert_finite(**none)
        assert (none["out"][:3] == 0).all() and np.abs(none["dq"][:3]).max() <= least
    assert (attend(call, dtype, sink, selected=nothing_selected())["dsink"] == 0).all()


@every_variant
@every_dtype
@pytest.mark.parametrize("sink", SINKS)
def test_queries_without_keys(variant, dtype, sink):
    without_keys(function(variant, dtype), dtype, SINKS[sink])


@every_variant
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("window", [1, 4])
def test_any_sink_beside_a_window(variant, window, sink):
    """Windows alone hold the query's own key at least; a sink of -inf is none."""
    found = attend(variant.function, sink=SINKS[sink], window=window, selected=nothing_selected())
    assert_finite(**found)
    if SINKS[sink] > 1e20:  # it takes all
        assert np.max([np.abs(found[name]).max() for name in NAMES[:4]]) < 1e-20
    if SINKS[sink] < -1e20:
        assert np.abs(found["dsink"]).max() < 1e-20
        np.testing.assert_allclose(found["out"], attend(variant.function, sink=-80.0, window=window,
                                                        selected=nothing_selected())["out"], 1e-6)


@every_variant
def test_a_slice_whose_queries_have_no_keys(variant):
    """Context ranks: from position 2 on, entry 0 is complete at the second query only."""
    found = attend(variant.function, offset=2)
    assert_finite(**found)
    assert (found["out"][:1] == 0).all() and np.abs(found["out"][1:]).min() > 0


@every_variant
@every_dtype
@pytest.mark.parametrize("window", [0, 4])
def test_an_entry_that_nobody_chose_is_not_read(variant, dtype, window):
    not_read(function(variant, dtype), dtype, window)


def not_read(call, dtype="float32", window=0) -> None:
    """NaN in the first and the last entry changes no bit, with -1 in every query's list."""
    selected = nothing_selected(slice(4, 9))
    clean = attend(call, dtype, window=window, selected=selected, poison=0.0)
    for poison in (np.nan, np.inf):
        dirty = attend(call, dtype, window=window, selected=selected, poison=poison)
        assert_finite(**dirty)
        for name in NAMES:
            np.testing.assert_array_equal(dirty[name], clean[name], name)
        assert (dirty["dcompressed"][[0, -1]] == 0).all()


def test_in_chunks(monkeypatch):
    monkeypatch.setattr(sparse_attention, "CHUNK_NUMBERS", 1)
    call = sparse_attention.paddle_sparse_attention
    for sink in SINKS.values():
        without_keys(call, "float32", sink, least=1e-36)  # an exponential of Paddle's is never zero on a CPU
    not_read(call)
    not_read(call, window=4)


@every_variant
@pytest.mark.parametrize("case", ["fp32", "bf16"])
def test_the_recorded_case(variant, case):
    """Of another implementation: query 0 of each batch element has no key. Outputs and all gradients."""
    cases = {name.removeprefix(f"{case}."): x for name, x in golden().items() if name.startswith(f"{case}.")}
    query, kv = leaf(cases["q"].transpose([1, 0, 2, 3])), leaf(cases["kv"].transpose([1, 0, 2]))
    sink, dtype = leaf(cases["sink"]), str(query.dtype).split(".")[-1]
    out = function(variant, dtype)(
        query, paddle.zeros_like(kv[: query.shape[0]]), kv, cases["idx"], sink, window=0, ratio=4, scale=16**-0.5
    )
    out.backward(cases["grad_out"].transpose([1, 0, 2, 3]).reshape(out.shape).astype(out.dtype))
    assert out.dtype == query.dtype and (array(out)[0] == 0).all()
    ours = {"o": out.reshape(query.shape).transpose([1, 0, 2, 3]), "dq": query.grad.transpose([1, 0, 2, 3]),
            "dkv": kv.grad.transpose([1, 0, 2]), "dsink": sink.grad}  # fmt: skip
    for name, x in ours.items():
        assert x.dtype == cases[name].dtype
        assert relative_error(array(x), array(cases[name])) < (1e-6 if x.dtype == paddle.float32 else 0.01), name


@every_variant
@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(variant, dtype, bad):
    """An entry that queries do see, and a sink."""
    selected = np.zeros((BATCH, ROWS, 1))
    seen = attend(function(variant, dtype), dtype, selected=selected, poison=bad)
    assert not np.isfinite(seen["out"]).all()
    sunk = attend(function(variant, dtype), dtype, sink=bad, selected=selected)
    assert not np.isfinite(sunk["dsink"]).all()


# ---- the naive versions


def naive(floor: float | None, sink_in_maximum: bool, first_row: bool = False):
    """Gathered keys as one writes it at first. ``floor``: the least maximum; ``first_row``: -1 reads entry 0."""

    def call(query, kv, compressed, selected, sink, window, ratio, scale, offset=0):
        s, b, heads, d = query.shape
        if selected is None:
            entry = paddle.arange(ENTRIES).unsqueeze(0)
            complete = ((paddle.arange(offset, offset + s) + 1) // ratio).unsqueeze(1)
            selected = paddle.where(entry < complete, entry, paddle.full_like(entry, -1)).expand([b, s, ENTRIES])
        hidden = (selected < 0).unsqueeze(2)
        keys = compressed.transpose([1, 0, 2])
        keys = paddle.stack([paddle.gather(keys[i], selected[i].clip(min=0).flatten()) for i in range(b)])
        keys = keys.reshape([b, s, -1, d])
        keys = keys if first_row else paddle.where(hidden.squeeze(2).unsqueeze(-1), paddle.zeros_like(keys), keys)
        scores = paddle.einsum("sbhd,bskd->bshk", query, keys) * scale
        scores = paddle.where(hidden.expand(scores.shape), paddle.full_like(scores, -np.inf), scores)
        sink = sink.reshape([1, 1, heads, 1])
        top = scores.max(-1, keepdim=True)
        top = paddle.maximum(top, sink.expand(top.shape)) if sink_in_maximum else top
        top = top if floor is None else top.clip(min=floor)
        e = paddle.exp(scores - top)
        out = paddle.einsum("bshk,bskd->sbhd", e / (e.sum(-1, keepdim=True) + paddle.exp(sink - top)), keys)
        return out.reshape([s, b, heads * d])

    return call


def test_without_a_least_maximum_everything_is_nan():
    with pytest.raises(AssertionError, match="not finite: out, .*dsink"):
        without_keys(naive(None, sink_in_maximum=False), "float32", 0.5)


def test_with_the_sink_after_the_shift_only_its_gradient_is_nan():
    call = naive(-1e30, sink_in_maximum=False)
    with pytest.raises(AssertionError, match="not finite: dsink$"):
        without_keys(call, "float32", 0.5)
    assert_finite(**{name: x for name, x in attend(call, selected=nothing_selected()).items() if name != "dsink"})


def test_with_the_sink_in_the_maximum_a_sink_of_minus_infinity_is_left():
    call = naive(None, sink_in_maximum=True)
    without_keys(call, "float32", 0.5)
    with pytest.raises(AssertionError, match="not finite"):
        without_keys(call, "float32", -np.inf)


def test_an_entry_read_in_place_of_none_is_found():
    not_read(naive(None, sink_in_maximum=True))
    with pytest.raises(AssertionError, match="not finite"):
        not_read(naive(None, sink_in_maximum=True, first_row=True))


class LastRow(Selected):
    """-1 reads the last entry of the batch element before, as an index does that nobody looks at."""

    def _flat_index(self):
        b, rows, _ = self.padded.shape
        own = paddle.arange(b, dtype=self.index.dtype).reshape([b, 1, 1]) * rows + self.index + 1
        return paddle.where(self.index < 0, (own - 1) % (b * rows), own).reshape([-1])


def test_the_last_row_read_in_place_of_none_is_found(monkeypatch):
    monkeypatch.setattr(sparse_attention, "Selected", LastRow)
    with pytest.raises(AssertionError):
        not_read(sparse_attention.paddle_sparse_attention)


def test_scores_masked_by_addition_alone_are_found(monkeypatch):
    """A maximum of masked scores makes their weights one; a sink above it leaves what an exponential has least."""
    monkeypatch.setattr(sparse_attention, "LOWEST_TOP", -np.inf)
    for sink, size in ((-np.inf, 0.1), (0.5, 0.0)):
        found = attend(sparse_attention.paddle_sparse_attention, sink=sink)
        assert np.abs(found["out"][:3]).max() > size
