"""PaddleFormers' LoRAModel around our adapters."""

import json

import numpy as np
import paddle
import pytest
from formers_runs import arguments, formers_losses, formers_model, formers_trainer, our_losses, our_trainer, settings
from formers_runs import table as tokens_of
from paddleformers.peft import LoRAConfig
from test_cli import run

from paddledsv4.config import LoraConfig
from paddledsv4.errors import UserError
from paddledsv4.formers import DeepseekV4ForCausalLM, LoRAModel
from paddledsv4.sft.adapter import save_adapter
from paddledsv4.sft.lora import adapters

TARGETS = [".*linear_(q_up|kv)_proj", ".*local_experts.*linear_fc1"]


def numbers(model) -> dict[str, np.ndarray]:
    found = adapters(model)
    return {f"{path}.{part}": getattr(a, part).numpy() for path, a in found.items() for part in ("lora_A", "lora_B")}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def lora_model(targets=TARGETS, **more) -> LoRAModel:
    return LoRAModel(formers_model(*settings()), LoRAConfig(r=4, lora_alpha=8, target_modules=targets, **more))


def test_the_same_losses_and_adapters(tmp_path):
    model, train = settings(steps=10)
    ours = our_trainer(model, train, lora=LoraConfig(r=4, lora_alpha=8, target_modules="|".join(TARGETS)))
    theirs = lora_model()
    trainer = formers_trainer(theirs, arguments(train, tmp_path), tokens_of(model, train))
    losses = our_losses(ours)
    assert formers_losses(trainer) == losses and losses[0] != losses[-1]
    assert equal(numbers(theirs.model.model), numbers(ours.model)) and len(numbers(ours.model)) > 20


def test_the_first_loss_is_the_base_models(tmp_path):
    model, train = settings(steps=1)
    args, tokens = arguments(train, tmp_path), tokens_of(model, train)
    base = formers_losses(formers_trainer(formers_model(model, train), args, tokens))
    assert formers_losses(formers_trainer(lora_model(), args, tokens)) == base


def test_its_own_optimizer_trains_adapters_alone(tmp_path):
    model, train = settings(steps=3)
    adapted = lora_model()
    before = {n: t.numpy() for n, t in adapted.model.model.state_dict().items()}
    formers_losses(formers_trainer(adapted, arguments(train, tmp_path), tokens_of(model, train), ours=False))
    changed = {n for n, t in adapted.model.model.state_dict().items() if not np.array_equal(t.numpy(), before[n])}
    assert changed and all(".lora_" in name for name in changed)


def test_files(tmp_path):
    """Its own, which `paddledsv4 convert` merges, and those of a run of ours."""
    model, train = settings(steps=3)
    base = formers_model(model, train)
    base.save_pretrained(tmp_path / "base")
    adapted = LoRAModel(base, LoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    formers_losses(formers_trainer(adapted, arguments(train, tmp_path / "run"), tokens_of(model, train)))
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "lora_config.json").read_text())["r"] == 4
    again = LoRAModel.from_pretrained(formers_model(model, train), tmp_path / "adapter")
    assert equal(numbers(again.model.model), numbers(adapted.model.model))
    assert run("convert", tmp_path / "base", tmp_path / "merged", "--to", "paddledsv4", "--adapter",
               tmp_path / "adapter") == 0  # fmt: skip
    row = dict.fromkeys(("input_ids", "labels"), paddle.arange(32).unsqueeze(0))
    merged = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "merged")
    assert float(merged(**row).loss) == pytest.approx(float(adapted(**row).loss), rel=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ("linear_q_up_proj", "linear_fc1")])
def test_adapters_of_our_runs(tmp_path, targets):
    config = LoraConfig(r=2, target_modules=targets)
    ours = our_trainer(*settings(), lora=config)
    save_adapter(ours.model, config, tmp_path)
    loaded = LoRAModel.from_pretrained(formers_model(*settings()), tmp_path)
    assert equal(numbers(loaded.model.model), numbers(ours.model))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rslora": True}, "LoRAConfig.rslora = True: is not supported"),
        ({"trainable_bias": "all"}, "LoRAConfig.trainable_bias = 'all': is not supported"),
        ({"lora_dropout": 0.1}, "lora.lora_dropout = 0.1: must be"),
        ({"targets": ".*q_proj"}, "matches no layer; paths end in linear_o_group_proj"),
        ({"targets": None}, "LoRAConfig.target_modules is empty"),
        ({"targets": "("}, "is no regular expression"),
    ],
)
def test_mistakes_are_one_sentence(values, sentence):
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        lora_model(**values)
    assert sentence in str(error.value)


def test_what_it_cannot_do_says_where_it_is_done():
    adapted = lora_model()
    for act in (adapted.merge, adapted.unmerge, adapted.disable_lora, adapted.restore_original_model):
        with pytest.raises(UserError, match="paddledsv4 convert BASE OUT"):
            act()
    with pytest.raises(UserError, match="LoRAModel.save_pretrained writes those"):
        adapted.model.save_pretrained("nowhere")
