"""The torch preset against the recorded Megatron run, bit for bit: the whole first step and ten steps of losses."""

import hashlib
import json

import numpy as np
import paddle
import pytest
from reference import ROOT, TINY, microbatch, tiny_configs, tiny_model
from safetensors.numpy import load_file

from align.losslog import loss_md5
from align.trace import Tracer
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.training.step import auxiliary_losses, microbatch_gradients
from paddledsv4.training.trainer import Trainer

pytest.importorskip("torch", reason="the torch preset needs paddledsv4[torch]")

RECORDED = json.loads((ROOT / "tests" / "data" / "tiny_fp32_md5.json").read_text())
# tensors that exist inside one of our ops only; their consumers are compared
INSIDE_AN_OP = ("topk_idxs", "per_token_loss", "main_loss_mean", "mtp_loss_mean", "grad_norm_step1")


def md5(x) -> str:
    return hashlib.md5(np.ascontiguousarray(x).tobytes()).hexdigest()


def different(recorded: dict[str, str], ours: dict) -> list[str]:
    return [name for name, digest in recorded.items() if name not in ours or md5(ours[name]) != digest]


@pytest.fixture(scope="module")
def first_step():
    """Tracer, main gradients, and parameters with expert biases after the step."""
    model, train = tiny_model("torch"), tiny_configs()[1]
    optimizer, mask = Optimizer(model, train), paddle.ones([2, train.sequence_length])
    with Tracer(model) as tracer:
        microbatch_gradients(model, auxiliary_losses(train), *microbatch(0), mask)
    optimizer.accumulate()
    microbatch_gradients(model, auxiliary_losses(train), *microbatch(1), mask)
    optimizer.accumulate()
    gradients = {state.name: state.main_grad.numpy().copy() for state in optimizer.states}
    for router in model.learned_routers():
        router.update_expert_bias(train.expert_bias_update_rate)
    optimizer.step(train.optimizer.lr)
    after = {name: p.numpy() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return tracer, gradients, after


def test_every_forward_tensor(first_step):
    recorded = {n: d for n, d in RECORDED["forward"].items() if not n.endswith(INSIDE_AN_OP)}
    wrong = different(recorded, first_step[0].forward)
    print(f"forward: {len(recorded) - len(wrong)} of {len(recorded)} equal")
    assert len(recorded) == 197 and not wrong


def test_every_activation_gradient(first_step):
    wrong = different(RECORDED["activation_grads"], first_step[0].gradients)
    print(f"activation gradients: {183 - len(wrong)} of {len(RECORDED['activation_grads'])} equal")
    assert len(RECORDED["activation_grads"]) == 183 and not wrong


def test_every_parameter_gradient(first_step):
    wrong = different(RECORDED["param_grads"], first_step[1])
    print(f"parameter gradients: {233 - len(wrong)} of {len(RECORDED['param_grads'])} equal")
    assert len(RECORDED["param_grads"]) == 233 and not wrong


def test_every_parameter_and_expert_bias_after_the_step(first_step):
    wrong = different(RECORDED["after_step1"], first_step[2])
    print(f"after step 1: {len(RECORDED['after_step1']) - len(wrong)} of {len(RECORDED['after_step1'])} equal")
    assert len(RECORDED["after_step1"]) == 236 and not wrong


def matches(policy: Policy, steps: int) -> tuple[int, int]:
    """Equal main and MTP losses, by the MD5 of their four bytes."""
    lines = [json.loads(line) for line in (TINY / "losses.jsonl").read_text().splitlines()]
    recorded = {(x["step"], x["microbatch"]): x for x in lines if "main_md5" in x}
    trainer = Trainer(*tiny_configs(), policy, np.load(TINY / "tokens.npy"), load_file(TINY / "init.safetensors"))
    main = mtp = 0
    for result in trainer.train(steps):
        for loss in result.losses:
            reference = recorded[result.step, loss.microbatch]
            main += loss_md5(loss.main) == reference["main_md5"]
            mtp += loss_md5(loss.mtp) == reference["mtp_md5"]
    return main, mtp


def test_ten_steps():
    assert matches(Policy.preset("torch"), 10) == (20, 20)


def test_one_native_op_breaks_it():
    """The check can fail: with one op of all on Paddle's kernels the losses differ within three steps."""
    assert matches(Policy.preset("torch", {"sinkhorn": "paddle"}), 3) != (6, 6)
