"""The optimizer against the formulas of spec section 13 in float64 numpy."""

import numpy as np
import paddle
import pytest
from paddle import nn

from paddledsv4.config import TrainConfig
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.optimizer import Optimizer


class TwoParameters(nn.Layer):
    def __init__(self):
        super().__init__()
        self.ops = Policy.preset("paddle").ops()
        self.vector = self.create_parameter([3], dtype="float64")
        self.matrix = self.create_parameter([2, 3], dtype="float64", default_initializer=nn.initializer.Normal())


def train_config(**changes) -> TrainConfig:
    values = {
        "precision": "fp64", "sequence_length": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "steps": 9,
        "optimizer": {
            "name": "adamw", "lr": 0.1, "schedule": "constant", "betas": [0.9, 0.95], "eps": 1e-8,
            "weight_decay": 0.1, "no_decay": "parameters with one dimension",
        },
        "clip_grad_norm": 1.0, "mtp_loss_scaling_factor": 0.1, "indexer_loss_coeff": 0.01,
        "indexer_sparse_loss": True, "seq_aux_loss_coeff": 1e-4, "expert_bias_update_rate": 1e-3,
    }  # fmt: skip
    return TrainConfig.from_dict(values | changes)


def expected(parameter, gradients, decay, clip):
    p, m, v = parameter, np.zeros_like(parameter), np.zeros_like(parameter)
    for t, g in enumerate(gradients, 1):
        g = g * clip[t - 1]
        p = p * (1 - 0.1 * decay)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.1 / (1 - 0.9**t) * m / (np.sqrt(v) / np.sqrt(1 - 0.95**t) + 1e-8)
    return p


@pytest.mark.parametrize("clip_grad_norm", [1.0, 1e6])
def test_three_steps(clip_grad_norm):
    paddle.seed(1)
    model = TwoParameters()
    before = {n: p.numpy().copy() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, train_config(clip_grad_norm=clip_grad_norm))
    rng, history, clip = np.random.default_rng(0), {"vector": [], "matrix": []}, []
    for _ in range(3):
        total = {n: np.zeros_like(p) for n, p in before.items()}
        for _ in range(2):
            for name, p in model.named_parameters():
                g = rng.normal(size=p.shape)
                (p * paddle.to_tensor(g)).sum().backward()
                total[name] += g
            optimizer.accumulate()
        norm = np.sqrt(sum((g**2).sum() for g in total.values()))
        clip.append(min(clip_grad_norm / (norm + 1e-6), 1.0))
        for name, g in total.items():
            history[name].append(g)
        assert abs(optimizer.step(0.1) - norm) < 1e-12
    for name, p in model.named_parameters():
        decay = 0.1 if p.ndim >= 2 else 0.0
        np.testing.assert_allclose(p.numpy(), expected(before[name], history[name], decay, clip), rtol=1e-12)


def test_decayed_parameters_come_first():
    states = Optimizer(TwoParameters(), train_config()).states
    assert [(s.name, s.weight_decay) for s in states] == [("matrix", 0.1), ("vector", 0.0)]


def test_gradients_are_dropped_after_the_step():
    model = TwoParameters()
    optimizer = Optimizer(model, train_config())
    model.matrix.sum().backward()
    optimizer.accumulate()
    optimizer.step(0.1)
    assert all(float(state.main_grad.abs().sum()) == 0 for state in optimizer.states)
    assert model.matrix.grad is None
