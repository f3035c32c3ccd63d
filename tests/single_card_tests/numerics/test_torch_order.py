"""torch's order of additions on Paddle's kernels: the same bits as torch, without torch in the computation."""

import json

import numpy as np
import paddle
import pytest
from reference import TINY, tiny_configs
from safetensors.numpy import load_file

from paddledsv4.numerics import torch_order
from paddledsv4.numerics.paddle_kernels import PaddleKernels
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equal(ours, theirs) -> float:
    return float((ours.detach().numpy() == theirs.detach().numpy()).mean())


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with torch's kernels")


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((64, 4), -1), ((64, 4, 4), 1), ((64, 7), -1), ((64, 131), -1), ((9, 1000), -1), ((5, 9001), -1), ((256, 16), 0),
     ((2, 100, 3, 7), 1), ((2, 513, 64), 1), ((70001,), None)],
)  # fmt: skip
def test_sums(torch, shape, dim):
    x = normal(*shape)
    theirs = torch.tensor(x).sum() if dim is None else torch.tensor(x).sum(dim)
    assert equal(torch_order.sum(paddle.to_tensor(x), dim), theirs) == 1.0
    if x.shape[-1] > 8 and dim in (-1, None):  # the check can fail: Paddle's own order is another
        assert equal(paddle.to_tensor(x).sum(dim), theirs) < 1.0


@pytest.mark.parametrize("length", [32, 100, 512])
def test_norms(torch, length):
    x = normal(50, length)
    assert equal(torch_order.norm(paddle.to_tensor(x), -1), torch.tensor(x).norm(dim=-1)) == 1.0
    assert float(PaddleKernels.vector_norm(paddle.to_tensor(x))) == float(torch.norm(torch.tensor(x)))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(512, 128, 64), (512, 512, 24), (130, 64, 128), (128, 512, 64), (64, 192, 48)]
)
def test_gemm_and_its_gradients(torch, m, k, n):
    x, w, g = normal(m, k), normal(n, k, seed=1), normal(m, n, seed=2)
    ours = [paddle.to_tensor(x, stop_gradient=False), paddle.to_tensor(w, stop_gradient=False)]
    theirs = [torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)]
    y, z = torch_order.matmul(ours[0], ours[1].t()), theirs[0] @ theirs[1].T
    y.backward(paddle.to_tensor(g))
    z.backward(torch.tensor(g))
    assert equal(y, z) == 1.0
    assert [equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "least"),
    [("rsqrt", 1.0), ("sqrt", 0.8), ("exp", 0.98), ("sigmoid", 0.95), ("silu", 0.95), ("softplus", 0.9)],
)
def test_elementwise(torch, name, least):
    """Most are torch's numbers, none is far; and the gradient is torch's formula."""
    x = np.abs(normal(10000)) + 0.01 if "sqrt" in name else normal(10000) * 3
    ours, theirs = paddle.to_tensor(x, stop_gradient=False), torch.tensor(x, requires_grad=True)
    y, z = getattr(torch_order, name)(ours), getattr(torch.nn.functional, name, getattr(torch, name, None))(theirs)
    y.sum().backward()
    z.sum().backward()
    assert equal(y, z) >= least
    np.testing.assert_allclose(y.numpy(), z.detach().numpy(), rtol=3e-7)
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-6, atol=1e-7)


def test_other_precisions_are_paddles_own():
    x = paddle.to_tensor(normal(8, 100).astype(np.float64))
    assert equal(torch_order.sum(x, -1), x.sum(-1)) == 1.0
    assert torch_order.exp(x).dtype == paddle.float64
    assert torch_order.matmul(x, x.t()).dtype == paddle.float64


def test_first_five_steps_without_torch():
    """Five steps of the megatron preset stay within 5e-6 of the recorded losses, the router's near tie at step 3
    included."""
    lines = [json.loads(line) for line in (TINY / "losses.jsonl").read_text().splitlines()]
    recorded = {(x["step"], x["microbatch"]): x for x in lines if "main_loss" in x}
    trainer = Trainer(
        *tiny_configs(), Policy.preset("megatron"), np.load(TINY / "tokens.npy"), load_file(TINY / "init.safetensors")
    )
    for result in trainer.train(5):
        for loss in result.losses:
            reference = recorded[result.step, loss.microbatch]
            assert abs(loss.main - float(reference["main_loss"])) < 5e-6, (result.step, loss.microbatch)
            assert abs(loss.mtp - float(reference["mtp_loss"])) < 5e-6, (result.step, loss.microbatch)
