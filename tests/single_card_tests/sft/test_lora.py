"""Adapters on a whole model: what is trained, that it begins as the base model, and golden gradients."""

import numpy as np
import paddle
import pytest
from packed import COMBINATIONS, cases, groups, trainer
from reference import ROOT

from paddledsv4.config import LoraConfig, Recipe
from paddledsv4.config.lora import ATTENTION, EXPERTS, GROUPED
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.sft import lora as module
from paddledsv4.sft.lora import Adapter, LoraLinear, adaptable, adapters, attach, targets
from paddledsv4.weights.load import named_tensors

EVERYTHING = LoraConfig(r=4, target_modules=[*ATTENTION, *EXPERTS, GROUPED])


def frozen_bytes(runner) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in named_tensors(runner.model).items()
            if name in runner.frozen}  # fmt: skip


@pytest.mark.parametrize(("preset", "precision"), COMBINATIONS)
def test_the_first_loss_is_the_base_models(preset, precision):
    """To the bit with adapters everywhere, on packed experts too; then they move, and nothing else does."""
    for packed in (False, True):
        base = next(trainer(preset, precision, packed).train(1))
        runner = trainer(preset, precision, packed, EVERYTHING)
        before = frozen_bytes(runner)
        first, second = runner.train(2)
        assert first.losses == base.losses and second.losses != first.losses
        assert frozen_bytes(runner) == before and len(before) > 50
        states = runner.optimizer.states
        assert all(".lora_" in s.name and s.parameter.dtype == paddle.float32 for s in states)
        assert len(states) == len(runner.optimizer.gradients.views) == 2 * len(adapters(runner.model)) > 0
        assert all(float(s.m.abs().max()) > 0 for s in states if s.name.endswith("lora_B") and "experts" not in s.name)


def test_names_of_the_base_stay():
    assert set(named_tensors(trainer(packed=True).model)) == set(trainer(lora=EVERYTHING).frozen)


def test_an_adapter_is_the_low_rank_product():
    """y of an adapted layer is that of the merged weight, dense and grouped, in float64."""
    rng = np.random.default_rng(0)
    runner = trainer(precision="fp64", packed=False, lora=EVERYTHING)
    attention = runner.model.decoder.layers[0].self_attention
    for adapter in (attention.linear_proj, attention.linear_o_group_proj_adapter):
        adapter.lora_B.set_value(rng.standard_normal(adapter.lora_B.shape))
        a, b = adapter.lora_A.numpy(), adapter.lora_B.numpy()
        groups = adapter.groups
        delta = np.concatenate([4.0 * y @ x for x, y in zip(np.split(a, groups), np.split(b, groups), strict=True)])
        weight = attention.linear_o_group_proj if groups > 1 else adapter.weight
        x = paddle.to_tensor(rng.standard_normal((3, 2, groups * weight.shape[1])))
        extra = (weight, groups) if groups > 1 else ()
        merged = paddle.to_tensor(weight.numpy() + delta)
        ours = adapter(x, *extra)
        theirs = adapter.ops.grouped_linear(x, merged, groups=groups) if groups > 1 else adapter.ops.linear(x, merged)
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), 1e-12, 1e-12)


def golden_run(case: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> ours and theirs, of one layer of experts with adapters."""
    golden = {key.removeprefix(f"{case}."): t for key, t in cases("mxfp4_lora_golden").items() if key.startswith(case)}
    precision = "bf16" if case.startswith("bf16") else "fp32"
    limit = 10.0 if case.endswith("10") else 1e30
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r"decoder\.layers\.1\..*local_experts.*")
    runner = trainer("paddle", precision, lora=config, n_routed_experts=4, moe_intermediate_size=64,
                     swiglu_limit=limit)  # fmt: skip
    experts = runner.model.decoder.layers[1].mlp.experts
    leaves = {}
    for index, expert in experts.local_experts.items():
        for ours, theirs in (("linear_fc1", "gate_and_up"), ("linear_fc2", "down")):
            layer = getattr(expert, ours)
            layer.weight.set_value(golden[f"{theirs}_projs_packed"][int(index)])
            layer.weight_scale.set_value(golden[f"{theirs}_projs_scales_u8"][int(index)])
            for part in "AB":
                tensor = getattr(layer, f"lora_{part}")
                tensor.set_value(golden[f"lora_{theirs}_{part}"][int(index)].t().astype("float32"))
                leaves.setdefault(f"grad_lora_{theirs}_{part}", []).append(tensor)
    x, weights = golden["x"].clone(), golden["weights"].clone()
    x.stop_gradient = weights.stop_gradient = False
    index, mask = golden["indices"].astype("int64"), golden["token_mask"].astype("bool")
    chosen = paddle.nn.functional.one_hot(index, 4)
    probs = (chosen * weights.astype("float32").unsqueeze(-1)).sum(1)
    routing = (chosen.sum(1) > 0) & mask.unsqueeze(1)
    rows, row_probs, token = experts.ops.permute(x, probs, routing)
    out = experts(rows, row_probs, routing.astype("int64").sum(0))
    y = experts.ops.unpermute(out, token, x.shape[0])
    paddle.autograd.backward([(y.astype("float32") ** 2).sum()])
    found = {"y": y, "dx": x.grad, "dweights": weights.grad}
    found |= {name: paddle.stack([leaf.grad.t() for leaf in kept]) for name, kept in leaves.items()}
    return {name: tuple(t.astype("float32").numpy() for t in (tensor, golden[name])) for name, tensor in found.items()}


def largest_error(pairs) -> float:
    """Relative L2; NaN counts as infinite."""
    worst = np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs.values()])
    return float(worst) if np.isfinite(worst) else float("inf")


@pytest.mark.parametrize("case", groups("mxfp4_lora_golden", r"(fp32|bf16)\.limit\d+"))
def test_golden_experts_with_adapters(case):
    """An expert without tokens, masked tokens, the clamp on and off."""
    assert largest_error(golden_run(case)) < (2e-6 if case.startswith("fp32") else 2.0**-8)


def test_planted_bugs_are_seen(monkeypatch):
    case = groups("mxfp4_lora_golden", r"fp32\.limit10")[0]
    factors = Adapter.factors
    with monkeypatch.context() as plant:  # no scale
        plant.setattr(Adapter, "factors", lambda self, x: (factors(self, x)[0] / 2.0, factors(self, x)[1]))
        assert largest_error(golden_run(case)) > 1e-3
    with monkeypatch.context() as plant:  # the base left out of backward
        plant.setattr(LoraLinear, "forward", lambda self, x: self.ops.add(
            self.base(x.detach()), self.ops.linear(self.ops.linear(x, self.factors(x)[0]), self.factors(x)[1])))
        assert largest_error(golden_run(case)) > 1e-3
    with monkeypatch.context() as plant:  # adapters in the precision of the model
        plant.setattr(module, "constant", lambda shape, dtype, value: constant(shape, "bfloat16", value))
        plant.setattr(Adapter, "draw", lambda self, name, seed: None)
        states = trainer("paddle", "bf16", lora=LoraConfig(r=4)).optimizer.states
        assert not all(s.parameter.dtype == paddle.float32 for s in states)


constant = module.constant


def test_small_steps_are_not_lost_in_bfloat16():
    """Adapters are float32 beneath a bfloat16 model: a step far below a bfloat16's distance moves them."""
    runner = trainer("paddle", "bf16", lora=LoraConfig(r=4), optimizer={"lr": 1e-5, "weight_decay": 0.0})
    before = {s.name: s.parameter.numpy() for s in runner.optimizer.states}
    list(runner.train(2))
    pulled = [s for s in runner.optimizer.states if s.name.endswith("lora_A") and float(s.m.abs().max()) > 0]
    assert len(pulled) > len(before) / 4
    assert all((s.parameter.numpy() != before[s.name]).mean() > 0.5 for s in pulled)


def test_which_layers():
    paths = adaptable(trainer().model)
    every = targets(paths, LoraConfig())
    assert every == targets(paths, LoraConfig(target_modules="all-linear")) == [p for p in paths if GROUPED not in p]
    assert {path.rpartition(".")[2] for path in every} == {*ATTENTION, *EXPERTS}
    shared = targets(paths, LoraConfig(target_modules=["shared_experts.linear_fc1"]))
    assert len(shared) == 3 and all(path.endswith("mlp.shared_experts.linear_fc1") for path in shared)
    assert len(targets(paths, LoraConfig(target_modules=r".*\.local_experts\..*"))) == 3 * 8 * 2
    for wrong, says in ((["linear_proj", "q_proj"], "no layer is called 'q_proj'; choose from: linear_o_group_proj"),
                        (["_proj"], "no layer is called '_proj'"), ("nothing", "matches no layer"),
                        ("(", "is no regular expression")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            targets(paths, LoraConfig(target_modules=wrong))


@pytest.mark.parametrize("wrong", [{"target_modules": []}, {"target_modules": 3}, {"r": 0}, {"lora_alpha": 0.0},
                                   {"lora_dropout": 0.1}, {"rank": 8}])  # fmt: skip
def test_wrong_sections(wrong):
    with pytest.raises(UserError, match=rf"lora\.{next(iter(wrong))}"):
        LoraConfig.from_dict(wrong)


def test_the_recipe_has_the_section(tmp_path):
    text = (ROOT / "configs" / "tiny.yaml").read_text() + "\nlora: {r: 4, lora_alpha: 8}\n"
    (tmp_path / "my.yaml").write_text(text)
    assert Recipe.from_file(tmp_path / "my.yaml").lora == LoraConfig(r=4, lora_alpha=8)


def test_only_once():
    runner = trainer(lora=LoraConfig(r=4))
    with pytest.raises(UserError, match="has adapters already"):
        attach(runner.model, LoraConfig(), 0)
    assert len(adapters(runner.model)) == len(targets(adaptable(trainer().model), LoraConfig()))
    assert Policy.preset("paddle").fingerprint == runner.policy.fingerprint
