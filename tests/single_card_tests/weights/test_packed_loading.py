"""Packed experts from checkpoints: released bytes as they are, others rounded to MXFP4 one piece at a time."""

from unittest import mock

import numpy as np
import pytest
from generated import released, small_config
from reference import initial_state
from test_cli import run

from paddledsv4.model import DeepseekV4Model
from paddledsv4.moe.mxfp4 import packed_weights, resident_bits, with_packed_experts
from paddledsv4.numerics.policy import Policy
from paddledsv4.transformer.build import unset_parameters
from paddledsv4.weights import mxfp4, source
from paddledsv4.weights.from_checkpoint import load_checkpoint
from paddledsv4.weights.load import load_megatron_state, named_tensors
from paddledsv4.weights.names import tensors
from paddledsv4.weights.source import Source


def packed_model() -> DeepseekV4Model:
    with unset_parameters():
        return DeepseekV4Model(small_config(), Policy.preset("paddle"), "fp32", expert_weight_format="mxfp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return released(tmp_path_factory.mktemp("weights") / "released")


def parts(opened: Source, path: str, index: int) -> list[np.ndarray]:
    """Weights (0) or scales (1) of a layer's pieces, as they are stored."""
    return [opened.raw(atom)[index] for atom in tensors(small_config(), "paddledsv4")[f"{path}.weight"].atoms]


def test_released_bytes_are_the_packed_weights(folder):
    """Nothing is unpacked on the way."""
    model = packed_model()
    unpacking = source.storage.decode
    fp8 = lambda kept, *rest: unpacking(kept, *rest) if kept.weight != "I8" else pytest.fail("unpacked")  # noqa: E731
    with mock.patch.object(source.storage, "decode", fp8):
        load_checkpoint(model, folder)
    with Source.open(folder, small_config()) as opened:
        for path, pair in packed_weights(model).items():
            for index in (0, 1):
                assert np.array_equal(pair[index].numpy(), np.concatenate(parts(opened, path, index))), path
    assert resident_bits(model) == 4.25 and len(packed_weights(model)) == 2 * 8 * 5


def test_numbers_of_other_formats_are_rounded(folder, tmp_path):
    """bfloat16 numbers that MXFP4 can hold come back exactly."""
    assert run("convert", folder, tmp_path / "bf16", "--to", "paddledsv4", "--dtype", "bf16") == 0
    ours, expected = packed_model(), packed_model()
    load_checkpoint(ours, tmp_path / "bf16")
    load_checkpoint(expected, folder)
    for path, pair in packed_weights(expected).items():
        numbers = (mxfp4.dequantize(*(t.numpy() for t in p)) for p in (packed_weights(ours)[path], pair))
        assert np.array_equal(*numbers), path


def test_given_weights_are_rounded():
    model = packed_model()
    load_megatron_state(model, with_packed_experts(initial_state(), model))
    for path, pair in packed_weights(model).items():
        for ours, theirs in zip(pair, mxfp4.quantize(initial_state()[f"{path}.weight"]), strict=True):
            assert np.array_equal(ours.numpy(), theirs)
    again = with_packed_experts({name: t.numpy() for name, t in named_tensors(model).items()}, model)
    load_megatron_state(model, again)
    assert all(np.array_equal(again[name], t.numpy()) for name, t in named_tensors(model).items())
