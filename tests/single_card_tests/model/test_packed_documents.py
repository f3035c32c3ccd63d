"""Packed documents compute what they compute alone: losses and all gradients, in every preset."""

from dataclasses import replace
from unittest import mock

import numpy as np
import paddle
import pytest

from paddledsv4.config import ModelConfig
from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.distributed.group import ALONE, Group
from paddledsv4.errors import UserError
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.ops import compress, sparse_attention
from paddledsv4.ops.attention_segments import Selected
from paddledsv4.ops.precision import accumulate_dtype
from paddledsv4.training.step import microbatch_gradients
from paddledsv4.transformer.build import AuxiliaryLosses
from paddledsv4.transformer.documents import WHOLE_ROWS, PackedDocuments, WholeRows
from paddledsv4.transformer.rotary import RotaryEmbedding

CONFIG = ModelConfig.from_dict({
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_nextn_predict_layers": 1,
    "num_attention_heads": 2, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2,
    "o_lora_rank": 8, "sliding_window": 16, "compress_ratios": [0, 4, 128, 4, 4], "rope_theta": 10000,
    "compress_rope_theta": 40000, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "num_hash_layers": 1, "initializer_range": 0.1, "rms_norm_eps": 1e-6, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 65536, "beta_fast": 32,
                     "beta_slow": 1},
    "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
})  # fmt: skip
# shorter and longer than groups of 4 and of 128, a single token, starts at any offset, equal lengths in both rows
ROWS = [[3, 130, 1, 18, 40], [5, 18, 2, 157, 10]]
LENGTH = 192
LOSSES = AuxiliaryLosses(indexer_coeff=0.5, sequence_coeff=0.1)


def batch():
    """ids, labels, mask [2, LENGTH], and where documents begin; a document's last label is not counted."""
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 96, (2, 2, LENGTH))
    mask = (rng.random((2, LENGTH)) < 0.7).astype("float32")
    bounds = [np.cumsum([0, *row]).astype(np.int32) for row in ROWS]
    for row, ends in enumerate(bounds):
        labels[row, :-1] = ids[row, 1:]
        labels[row, ends[1:] - 1], mask[row, ends[1:] - 1] = 0, 0
    return ids, labels, mask, bounds


def build(preset: str, precision: str) -> DeepseekV4Model:
    paddle.seed(3)
    model = DeepseekV4Model(CONFIG, Policy.preset(preset), precision)
    for name, p in model.named_parameters():
        if name.endswith(("attn_sink", "ape")):
            p.set_value(paddle.randn(p.shape, p.dtype))
    return model


def gradients(model) -> dict[str, np.ndarray]:
    found = {n: p.grad.numpy() if p.grad is not None else np.zeros(p.shape) for n, p in model.named_parameters()}
    model.clear_gradients()
    return found


def packed(model, losses=LOSSES):
    """Token losses of main and MTP head, mean losses, gradients: all documents at once."""
    ids, labels, mask, bounds = batch()
    ids, labels = (paddle.to_tensor(x) for x in (ids, labels))
    mask = paddle.to_tensor(mask, accumulate_dtype(model.output_layer.weight.dtype))
    documents = PackedDocuments(bounds)
    with paddle.no_grad():
        tokens = model.losses(ids, labels, mask, losses, documents)
    means = microbatch_gradients(model, losses, ids, labels, mask, documents)
    return tokens, [float(x) for x in means], gradients(model)


def alone(model, losses=LOSSES):
    """The same, a document at a time; a document's loss weighs its share of what is counted."""
    ids, labels, mask, bounds = batch()
    main, mtp = np.zeros((2, LENGTH)), np.zeros((2, LENGTH))
    ahead = np.zeros((2, LENGTH))
    for row, ends in enumerate(bounds):
        for start, stop in zip(ends, ends[1:], strict=False):
            ahead[row, start : stop - 1] = mask[row, start + 1 : stop]
    counts, total, means = (mask.sum(), ahead.sum()), mask.size, [0.0, 0.0]
    model.clear_gradients()
    for row, ends in enumerate(bounds):
        for start, stop in zip(ends, ends[1:], strict=False):
            mine = row, slice(start, stop)
            one = [paddle.to_tensor(x[mine][None]) for x in (ids, labels)]
            weight = paddle.to_tensor(mask[mine][None], accumulate_dtype(model.output_layer.weight.dtype))
            share = (stop - start) / total
            here = replace(losses, indexer_coeff=losses.indexer_coeff * share,
                           sequence_coeff=losses.sequence_coeff * share)
            got = model.losses(*one, weight, here)
            main[mine], mtp[mine] = got.main.numpy()[0], got.mtp[0].numpy()[0]
            np.testing.assert_array_equal(got.mtp_masks[0].numpy()[0], ahead[mine])
            values = [(got.main * got.main_mask).sum() / counts[0], (got.mtp[0] * got.mtp_masks[0]).sum() / counts[1]]
            means = [a + float(b) for a, b in zip(means, values, strict=True)]
            paddle.autograd.backward([values[0], values[1] * losses.mtp_factor])
    return (main, mtp), means, gradients(model)


def error(ours, reference, least: float = 0.0) -> float:
    """Relative, of numbers whose norm counts as ``least`` at least. NaN compares as infinite."""
    distance = np.linalg.norm(np.float64(ours) - reference) / max(np.linalg.norm(reference), least, 1e-300)
    return float(distance) if np.isfinite(distance) else float("inf")


def worst(model, losses=LOSSES) -> float:
    """The largest relative error of anything."""
    tokens, means, grads = packed(model, losses)
    (main, mtp), other_means, other_grads = alone(model, losses)
    # streams that are still alike make some gradients zero: what is left of those is rounding
    least = 1e-3 * max(np.linalg.norm(g) for g in other_grads.values())
    errors = {name: error(g, other_grads[name], least) for name, g in grads.items()}
    real = tokens.mtp_masks[0].numpy() > 0
    errors["main"], errors["mtp"] = error(tokens.main.numpy(), main), error(tokens.mtp[0].numpy()[real], mtp[real])
    errors |= {f"mean {i}": error(a, b) for i, (a, b) in enumerate(zip(means, other_means, strict=True))}
    name = max(errors, key=errors.get)
    print(name, errors[name])
    return errors[name]


@pytest.mark.parametrize("preset", ["paddle", "plain", pytest.param("megatron", marks=pytest.mark.slow), "torch"])
def test_packed_documents_are_the_documents_alone(preset):
    if preset == "torch":
        pytest.importorskip("torch")
    assert worst(build(preset, "fp32")) < 1e-4


def test_in_float64_only_rounding_is_left():
    assert worst(build("paddle", "fp64")) < 1e-12


def test_the_dense_indexer_loss_too():
    assert worst(build("paddle", "fp64"), replace(LOSSES, indexer_sparse=False)) < 1e-12


def test_in_bfloat16_the_losses_agree_to_its_rounding():
    model = build("paddle", "bf16")
    tokens, means, grads = packed(model)
    (main, _), other_means, _ = alone(model)
    assert error(tokens.main.astype("float32").numpy(), main) < 0.01
    assert np.allclose(means, other_means, rtol=0.01)
    assert len(grads) > 100


def border_off_by_one(cu_seqlens):
    return [np.unique([0, *(bounds[1:-1] + 1), bounds[-1]]) for bounds in cu_seqlens]


def no_border(cu_seqlens):
    return [bounds[[0, -1]] for bounds in cu_seqlens]


def with_bounds(change):
    original = PackedDocuments.__init__
    return PackedDocuments, "__init__", lambda self, bounds: original(self, change(bounds))


def previous_group_of_the_neighbour(x, fill):
    """[g, r, b, 2d]: the first group of a document takes the last one of the document beside it."""
    first, second = paddle.chunk(x, 2, -1)
    return paddle.concat([paddle.concat([first[-1:].roll(1, 2), first[:-1]], 0), second], 1)


def entries_of_the_neighbour(self):
    b, rows, _ = self.padded.shape
    return (self.index + 1 + paddle.arange(b).roll(1).reshape([b, 1, 1]).astype("int32") * rows).reshape([-1])


def window_of_the_neighbour(kv, queries, window):
    """The keys before a document are those at the end of the document beside it."""
    keys, missing = near_keys(kv, queries, window)
    before = kv[-min(window, queries):].transpose([1, 0, 2]).roll(1, 0)
    return paddle.concat([keys[:, : window - before.shape[1]], before, keys[:, window:]], 1), 0


def positions_go_on(self, ops, length, dtype, stride=1):
    """Tokens are turned as if their documents began at position 9, compressed entries as if at 0."""
    first = 9 if stride == 1 else 0
    return tuple(table[first:] for table in table_of(self, ops, length + first, dtype, stride))


def mask_late_by_one(self, x, sequence):
    rolled = sequence.roll_left(x)
    return paddle.where(self.lasts.roll(1, 1), paddle.zeros_like(rolled), rolled)


near_keys, table_of, parts_of = sparse_attention.near_keys, RotaryEmbedding.table, PackedDocuments.parts
PLANTS = {
    "no border at all": with_bounds(no_border),
    "every border one too late": with_bounds(border_off_by_one),
    "the window reaches the document before": (sparse_attention, "near_keys", window_of_the_neighbour),
    "the overlap of the compressor crosses the border": (compress, "_overlap", previous_group_of_the_neighbour),
    "the indexer chooses entries of another document": (Selected, "_flat_index", entries_of_the_neighbour),
    "rotary positions of tokens do not begin anew": (RotaryEmbedding, "table", positions_go_on),
    "MTP takes the next document's first token": (PackedDocuments, "roll_left", WholeRows.roll_left),
    "MTP's mask is one too late": (PackedDocuments, "roll_left", mask_late_by_one),
    "losses of documents weigh the same": (
        PackedDocuments, "parts", lambda self, sequence: [replace(p, share=1.0) for p in parts_of(self, sequence)]),
}  # fmt: skip


def test_planted_bugs_are_seen():
    model, missed = build("paddle", "fp64"), []
    expected = alone(model)
    for bug, plant in PLANTS.items():
        with mock.patch.object(*plant), mock.patch(f"{__name__}.alone", lambda *_: expected):
            try:
                seen = worst(model) > 1e-6
            except AssertionError:
                seen = True
        missed += [] if seen else [bug]
    assert not missed


def test_other_documents_change_nothing():
    """In float64, where the expert's rows that lie elsewhere in a GEMM round elsewhere too."""
    ids, labels, mask, bounds = batch()
    model, documents = build("paddle", "fp64"), PackedDocuments(bounds)

    def losses(ids):
        with paddle.no_grad():
            found = model.losses(*map(paddle.to_tensor, (ids, labels, mask)), LOSSES, documents)
        return np.stack([found.main.numpy(), found.mtp[0].numpy()])

    changed = ids.copy()
    changed[0, 3:133] = (changed[0, 3:133] + 1) % 96
    distance = np.abs(losses(ids) - losses(changed))
    assert distance[:, 0, 3:132].min(1).max() > 1e-6
    distance[:, 0, 3:133] = 0
    assert distance.max() < 1e-12


def test_one_document_per_row_is_the_identity():
    ids, labels, mask, _ = batch()
    model, whole = build("paddle", "fp32"), PackedDocuments([[0, LENGTH]] * 2)
    for documents in (WHOLE_ROWS, whole):
        microbatch_gradients(model, LOSSES, *map(paddle.to_tensor, (ids, labels, mask)), documents)
        found = gradients(model)
        if documents is WHOLE_ROWS:
            expected = found
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("bounds", [[], [[0, 4], [0, 5]], [[1, 4]], [[0, 3, 3]], [[0]], [[0, 5, 4]]], ids=str)
def test_bounds_that_make_no_sense(bounds):
    with pytest.raises(UserError, match="cu_seqlens must"):
        PackedDocuments(bounds)


def test_bounds_of_another_length_and_slices_are_refused():
    documents = PackedDocuments([[0, 3, 8]])
    with pytest.raises(UserError, match="end at 8, the sequences have 9 tokens"):
        documents.parts(SequenceSlice(ALONE.context, 9))
    with pytest.raises(UserError, match="set parallel.context to 1"):
        documents.parts(SequenceSlice(Group("context", (0, 1)), 4))
