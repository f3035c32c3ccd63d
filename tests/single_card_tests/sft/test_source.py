"""Rows of packed documents: every epoch has each once, and a row's number is all it takes to find it."""

from collections import Counter

import numpy as np
import pytest

from paddledsv4.errors import UserError
from paddledsv4.sft.dataset import Document
from paddledsv4.sft.source import PackedSource, hold_out


def documents(count: int = 30) -> list[Document]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 40, count)
    return [Document(i + 1, (1000 * i + np.arange(n)).astype(np.int32), (rng.random(n) < 0.6).astype(np.uint8))
            for i, n in enumerate(sizes)]  # fmt: skip


def found(batch) -> Counter:
    """Documents of a batch, by their first token; padding is id 1."""
    starts = [row[b] for row, bounds in zip(batch.inputs, batch.cu_seqlens, strict=True) for b in bounds[:-1]]
    return Counter(int(token) // 1000 for token in starts if token != 1)


def test_every_epoch_has_every_document_once():
    source = PackedSource(documents(), 64)
    first, second = len(source), len(source.sequences(1))
    for start, count in ((0, first), (first, second)):
        assert found(source.rows(start, count)) == Counter(range(30))
    assert (source.rows(0, 1).inputs != source.rows(first, 1).inputs[:, :1]).any()


def test_rows_do_not_depend_on_what_was_asked_before():
    source, other = PackedSource(documents(), 64, seed=3), PackedSource(documents(), 64, seed=3)
    walked = [source.rows(row, 1) for row in range(3 * len(source))]
    for row in (3 * len(source) - 1, 2, len(source) + 3):
        for a, b in zip(other.rows(row, 1), walked[row], strict=True):
            assert np.array_equal(a, b)


def test_counted_labels_are_the_trained_tokens():
    docs = documents()
    source = PackedSource(docs, 64)
    batch = source.rows(0, len(source))
    trained = sorted(int(t) for d in docs for t, m in zip(d.token_ids[1:], d.loss_mask[1:], strict=True) if m)
    assert sorted(batch.labels[batch.loss_mask > 0].tolist()) == trained
    assert sorted(batch.labels[np.roll(batch.loss_mask, 1, 1) > 0].tolist()) != trained  # a mask late by one is seen
    counted = batch.loss_mask > 0
    assert (batch.labels[counted] == batch.inputs[counted] + 1).all()


def test_padding_is_to_a_multiple_and_at_most_the_sequence():
    lengths = {PackedSource(documents(), 60, multiple=m).rows(0, 4).inputs.shape[1] for m in (1, 16, 64)}
    assert max(lengths) == 60 and PackedSource(documents()[:1], 60, multiple=16).rows(0, 1).inputs.shape[1] % 16 == 0


def test_the_fingerprint_tells_data_and_settings_apart():
    docs = documents()
    changed = [*docs[:-1], Document(30, docs[-1].token_ids, 1 - docs[-1].loss_mask)]
    cases = [(docs, 64), (docs, 64, 1), (docs, 60), (changed, 64)]
    sources = [PackedSource(*case) for case in cases]
    assert len({source.fingerprint for source in sources}) == 4
    assert PackedSource(docs, 64).fingerprint == sources[0].fingerprint


def test_hold_out():
    docs = documents()
    rest, held = hold_out(docs, 0.1, seed=5)
    assert len(held) == 3 and sorted(d.number for d in rest + held) == list(range(1, 31))
    assert [d.number for d in held] != [d.number for d in hold_out(docs, 0.1, seed=6)[1]]
    assert hold_out(docs, 0.0, seed=5) == (docs, [])
    with pytest.raises(UserError, match="leaves none of 1 conversations"):
        hold_out(docs[:1], 0.5, seed=5)
    with pytest.raises(UserError, match="no conversation to pack"):
        PackedSource([], 64)
