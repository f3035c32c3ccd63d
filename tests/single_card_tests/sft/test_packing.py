"""Packed sequences: every document once and whole, bounds, labels that never cross them, padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_cases import ROOT, needs_tokenizer

from paddledsv4.errors import UserError
from paddledsv4.sft.dataset import Document, read_documents
from paddledsv4.sft.packing import PackedBatch, collate, efficiency, pack, packed_batches

PAD = 1


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents whose tokens are all different, so that each can be recognised; every third token is trained."""
    starts = np.cumsum([10, *lengths])
    return [
        Document(number, np.arange(start, start + n, dtype=np.int32), (np.arange(n) % 3 == 1).astype(np.uint8))
        for number, (start, n) in enumerate(zip(starts, lengths, strict=False))
    ]


lengths_and_room = st.lists(st.integers(1, 40), min_size=1, max_size=60).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths), 100))
)


@settings(deadline=None)
@given(lengths_and_room, st.integers(0, 5))
def test_every_document_once_and_none_too_many(lengths_and_room, seed):
    lengths, capacity = lengths_and_room
    sequences = pack(lengths, capacity, seed)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in sequence) for sequence in sequences]
    assert max(used) <= capacity
    assert all(a + b > capacity for k, a in enumerate(used) for b in used[:k])  # no two would fit into one
    assert pack(lengths, capacity, seed) == sequences


def whole(batch: PackedBatch, documents: list[Document]) -> bool:
    """Is each sequence its documents, their own labels and masks, and then padding that is never trained?"""
    for row, (bounds, numbers) in enumerate(zip(batch.cu_seqlens, batch.numbers, strict=True)):
        for start, end, number in zip(bounds, bounds[1:], numbers, strict=False):
            ids, mask = documents[number].token_ids, documents[number].loss_mask
            fits = (
                np.array_equal(batch.tokens[row, start:end], ids)
                and np.array_equal(batch.labels[row, start:end], [*ids[1:], PAD])
                and np.array_equal(batch.loss_mask[row, start:end], [*mask[1:], 0])
                and np.array_equal(batch.position_ids[row, start:end], np.arange(end - start))
                and (batch.document_ids[row, start:end] == batch.document_ids[row, start]).all()
            )
            if not fits:
                return False
        end = bounds[len(numbers)]
        if (batch.tokens[row, end:] != PAD).any() or batch.loss_mask[row, end:].any():
            return False
    return True


@settings(deadline=None)
@given(lengths_and_room, st.integers(1, 3), st.sampled_from([1, 8, 64]))
def test_batches(lengths_and_room, size, multiple):
    lengths, capacity = lengths_and_room
    documents = documents_of(lengths)
    batches = list(packed_batches(documents, capacity, size, 0, multiple))
    for batch in batches:
        assert whole(batch, documents)
        length = batch.tokens.shape[1]
        assert length == capacity or length % multiple == 0
        assert max(int(b[len(n)]) for b, n in zip(batch.cu_seqlens, batch.numbers, strict=True)) > length - multiple
        assert all(b[0] == 0 and b[-1] == length and (np.diff(b) > 0).all() for b in batch.cu_seqlens)
    numbers = [n for batch in batches for sequence in batch.numbers for n in sequence]
    assert sorted(numbers) == list(range(len(lengths)))
    assert efficiency(batches) == sum(lengths) / sum(batch.tokens.size for batch in batches)


@pytest.mark.parametrize("plant", ["labels", "loss_mask", "position_ids"])
def test_a_planted_leak_is_seen(plant):
    documents = documents_of([5, 4])
    batch = collate([documents], 12, PAD)
    assert whole(batch, documents)
    leaked = {  # as if the two were one document
        "labels": np.where(np.arange(12) == 4, documents[1].token_ids[0], batch.labels),
        "loss_mask": np.where(np.arange(12) == 4, 1, batch.loss_mask),
        "position_ids": np.arange(12)[None],
    }[plant]
    getattr(batch, plant)[:] = leaked
    assert not whole(batch, documents)


def test_the_seed_decides_the_order():
    lengths = np.random.default_rng(0).integers(1, 50, 100).tolist()
    assert pack(lengths, 128, 1) == pack(lengths, 128, 1) != pack(lengths, 128, 2)
    assert pack(lengths, 128, (1, 0)) != pack(lengths, 128, (1, 1))  # seed and epoch


def test_too_long():
    with pytest.raises(UserError, match="row 1 has 9 tokens, more than sequence_length = 8"):
        list(packed_batches(documents_of([3, 9]), 8))
    for lengths in ([9], [0]):
        with pytest.raises(UserError, match="a sequence holds 1 to 8"):
            pack(lengths, 8)


@needs_tokenizer
@pytest.mark.parametrize("sequence_length", [512, 1024, 4096])
def test_the_sample_fills_its_sequences(sequence_length):
    documents = read_documents(ROOT / "paddledsv4" / "sft" / "data" / "sample.jsonl")
    batches = list(packed_batches(documents, sequence_length, multiple=64))
    assert efficiency(batches) >= 0.97
    one_by_one = [collate([[document]], max(map(len, documents)), PAD) for document in documents]
    assert efficiency(one_by_one) < 0.5  # so the figure says something
