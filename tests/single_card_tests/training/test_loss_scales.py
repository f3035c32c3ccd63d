"""The scales of the auxiliary losses, in both settings of the switch."""

import numpy as np
import pytest
from reference import tiny_configs

from paddledsv4.config import TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.step import auxiliary_losses
from paddledsv4.training.trainer import Trainer


@pytest.mark.parametrize("microbatches", [1, 3, 4])
def test_seeds(microbatches):
    train = tiny_configs()[1].replace(gradient_accumulation_steps=microbatches)
    assert train.indexer_loss_scale == "megatron"
    reference = auxiliary_losses(train)
    assert (reference.seed, reference.indexer_seed) == (1 / microbatches, 1.0)
    divided = auxiliary_losses(train.replace(indexer_loss_scale="per_microbatch"))
    assert (divided.seed, divided.indexer_seed) == (1 / microbatches, 1 / microbatches)


def indexer_moments(scale: str, microbatches: int) -> np.ndarray:
    """First moments of the indexer's query weights after a step whose microbatches are all the same."""
    model, train = tiny_configs()
    model = model.replace(num_hidden_layers=1, compress_ratios=(4, 0), num_hash_layers=0, vocab_size=64)
    train = train.replace(
        sequence_length=32, micro_batch_size=1, gradient_accumulation_steps=microbatches, clip_grad_norm=0.0,
        indexer_loss_scale=scale,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 64, (1, 33))
    trainer = Trainer(model, train, Policy.preset("paddle"), tokens, precision="fp64")
    next(trainer.train(1))
    found = {state.name: state.m.numpy() for state in trainer.optimizer.states}
    return found["decoder.layers.0.self_attention.core_attention.indexer.linear_wq_b.weight"]


def test_equal_microbatches_give_one_microbatchs_gradient_only_where_it_is_divided():
    one = indexer_moments("per_microbatch", 1)
    assert np.abs(one).max() > 0
    np.testing.assert_array_equal(one, indexer_moments("megatron", 1))
    np.testing.assert_allclose(indexer_moments("per_microbatch", 4), one, 1e-12)
    np.testing.assert_allclose(indexer_moments("megatron", 4), 4 * one, 1e-12)


def test_another_name_is_refused():
    values = tiny_configs()[1].model_dump() | {"indexer_loss_scale": "none"}
    with pytest.raises(UserError, match="training.indexer_loss_scale = 'none': must be 'megatron' or 'per_microbatch'"):
        TrainConfig.model_validate(values)
