"""`paddledsv4 sft`: from conversations to weights, resumed runs, the evaluation, and what is refused."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest

pytest.importorskip("tokenizers", reason="needs paddledsv4[sft]")

from safetensors.numpy import load_file
from sft_runs import conversation, sft_recipe

from paddledsv4.cli import main
from paddledsv4.numerics.policy import Policy
from paddledsv4.sft import tokenizer
from paddledsv4.sft.load import sources
from paddledsv4.sft.recipe import SftRecipe
from paddledsv4.sft.source import PackedSource
from paddledsv4.training import trainer as trainer_module
from paddledsv4.training.evaluation import evaluate
from paddledsv4.training.runlog import read_log
from paddledsv4.training.trainer import Trainer
from paddledsv4.weights.source import Source

ROOT = Path(__file__).resolve().parents[3]


def run(recipe: Path, *options) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--config", str(recipe), *map(str, options)])
    return ended.value.code


def records(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_log(folder / "train.jsonl")[1]]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "weights").iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps: its recipe and its folder."""
    folder = tmp_path_factory.mktemp("sft")
    recipe = sft_recipe(folder)
    assert run(recipe, "--out", folder / "out") == 0
    return recipe, folder / "out"


def test_a_run_leaves_log_curves_and_weights(finished, capsys):
    _, out = finished
    header, steps = read_log(out / "train.jsonl")
    assert [s["step"] for s in steps] == [1, 2, 3, 4] and (out / "loss.png").stat().st_size > 1000
    assert [("evaluation" in s) for s in steps] == [False, True, False, True]
    assert header["training"]["linear_cross_entropy"] is True
    assert steps[-1]["evaluation"] < steps[1]["evaluation"] < math.log(288) + 0.2
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < set(weights(out))


def test_the_weights_are_those_of_the_last_step(finished, tmp_path):
    recipe, out = finished
    loaded = SftRecipe.from_file(sft_recipe(tmp_path, weights=str(out / "weights")))
    train, held, _ = sources(loaded)
    again = Trainer(loaded.model, loaded.training, Policy.preset("paddle"), train, weights=Path(loaded.weights))
    assert evaluate(again, held) == records(out)[-1]["evaluation"]
    fresh = Trainer(loaded.model, loaded.training, Policy.preset("paddle"), train)
    assert evaluate(fresh, held) != records(out)[-1]["evaluation"]
    with Source.open(out / "weights", loaded.model) as source:
        assert source.format == "paddledsv4"


def test_two_halves_are_the_whole_bit_for_bit(finished, tmp_path):
    recipe, whole = finished
    saved = "--save", tmp_path / "saved", "--save-interval", 2
    assert run(recipe, "--steps", 2, *saved, "--out", tmp_path / "half") == 0
    assert run(recipe, *saved, "--resume", "auto", "--out", tmp_path / "out") == 0
    assert records(tmp_path / "half") + records(tmp_path / "out") == records(whole)
    assert weights(tmp_path / "out") == weights(whole)


def test_evaluation_is_the_mean_over_counted_tokens(finished):
    recipe = SftRecipe.from_file(finished[0])
    train, held, _ = sources(recipe)
    runner = Trainer(recipe.model, recipe.training, Policy.preset("paddle"), train)
    total = count = 0.0
    for document in held.documents:
        ids = document.token_ids.astype("int64")
        with paddle.no_grad():
            logits = runner.model(paddle.to_tensor(ids[None, :-1]))[:, 0].numpy().astype(np.float64)
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        total, count = total + (losses * document.loss_mask[1:]).sum(), count + document.loss_mask[1:].sum()
    assert evaluate(runner, held) == pytest.approx(total / count, rel=1e-6)
    several = PackedSource(held.documents, 48, multiple=8)  # other sequences, the same documents
    assert len(several) > len(held) and evaluate(runner, several) == pytest.approx(total / count, rel=1e-6)


def test_evaluation_changes_nothing(finished, tmp_path):
    assert run(sft_recipe(tmp_path, evaluation_interval=1), "--out", tmp_path / "out") == 0
    without = [{k: v for k, v in r.items() if k != "evaluation"} for r in records(tmp_path / "out")]
    assert without == [{k: v for k, v in r.items() if k != "evaluation"} for r in records(finished[1])]


def test_another_data_position_is_seen(finished, tmp_path):
    """The equality of resumed runs can fail."""
    saved = "--save", tmp_path / "saved", "--save-interval", 2
    assert run(finished[0], "--steps", 2, *saved, "--out", tmp_path / "half") == 0
    original = trainer_module.Trainer.go_on_after
    with mock.patch.object(trainer_module.Trainer, "go_on_after", lambda self, s, rows: original(self, s, rows + 1)):
        assert run(finished[0], *saved, "--resume", "auto", "--out", tmp_path / "out") == 0
    assert weights(tmp_path / "out") != weights(finished[1])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"vocab_size": 100}}, r"model.vocab_size = 100: must be at least 270, the number of ids"),
        ({"training": {"sequence_length": 24}}, r"row \d+ has \d+ tokens, more than max_tokens = 24"),
        ({"conversations": {"max_tokens": 97}}, r"max_tokens = 97: must be at most training.sequence_length \(96\)"),
        ({"data": {"file": "none.jsonl"}}, "none.jsonl"),
        ({"data": {"tokenizer": "none.json"}}, "cannot be read"),
        ({"data": {"evaluation": "rows.jsonl"}}, "held_out = 0.2: must be left out with data.evaluation"),
        ({"data": {"hold_out": 0.1}}, "hold_out is not a known key; did you mean held_out"),
        ({"parallel": {"world_size": 2, "context": 2}}, "parallel.context = 2: must be 1: packed documents"),
        ({"parallel": {"world_size": 2, "tensor": 2, "sequence_parallel": True}, "data": {"multiple": 7}},
         "data.multiple = 7: must be divisible by parallel.tensor"),
        ({"parallel": {"world_size": 2, "data": 2, "expert": 2}}, "export = True: must be false with parallel.expert"),
        ({"parallel": {"world_size": 2, "tensor": 2}, "training": {"linear_cross_entropy": True}}, "1 process was"),
    ],
)
def test_what_is_refused(tmp_path, capsys, sections, said):
    assert run(sft_recipe(tmp_path, **sections), "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert re.search(said, captured.err), captured.err
    assert not (tmp_path / "out").exists()


def test_weights_are_never_overwritten(finished, capsys):
    before = weights(finished[1])
    assert run(finished[0], "--out", finished[1]) == 2
    assert "exists, where this run would write its weights" in capsys.readouterr().err
    assert weights(finished[1]) == before


def test_the_tokenizer_is_not_installed(tmp_path, capsys):
    recipe = sft_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("  tokenizer: tokenizer.json\n", ""))
    with mock.patch.object(tokenizer, "find_spec", lambda name: None):
        assert run(recipe, "--out", tmp_path / "out") == 2
    assert 'DeepSeek\'s tokenizer is not installed: pip install "paddledsv4[sft]"' in capsys.readouterr().err


def test_in_bfloat16_too(tmp_path):
    recipe = sft_recipe(tmp_path, training={"precision": "bf16", "steps": 2})
    assert run(recipe, "--out", tmp_path / "out") == 0
    loaded = SftRecipe.from_file(sft_recipe(tmp_path, training={"precision": "bf16"}))
    train, held, _ = sources(loaded)
    again = Trainer(
        loaded.model, loaded.training, Policy.preset("paddle"), train, weights=tmp_path / "out" / "weights"
    )
    assert evaluate(again, held) == records(tmp_path / "out")[-1]["evaluation"]


def test_long_rows_are_left_out_when_asked(tmp_path, capsys):
    recipe = sft_recipe(tmp_path, conversations={"skip_invalid": True}, export=False)
    with (tmp_path / "rows.jsonl").open("a") as file:
        long = conversation(1)
        long["messages"][1]["content"] *= 20
        file.write(json.dumps(long) + "\n")
    assert run(recipe, "--steps", 1, "--out", tmp_path / "out") == 0
    assert "1 invalid rows left out, the first: row 25 has" in capsys.readouterr().out
    assert not (tmp_path / "out" / "weights").exists()


def test_tensor_ranks_do_without_the_fused_loss(tmp_path):
    recipe = SftRecipe.from_file(sft_recipe(tmp_path, parallel={"world_size": 2, "tensor": 2}))
    assert not recipe.training.linear_cross_entropy


def test_the_shipped_recipe_is_one():
    recipe = SftRecipe.from_file(ROOT / "configs" / "sft-tiny.yaml")
    assert recipe.model.vocab_size == 129280 and Path(recipe.data.file).is_file()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    assert "paddledsv4 sft --config configs/sft-tiny.yaml" in capsys.readouterr().out


def test_the_recipe_for_flash_is_a_recipe():
    """It is not run here; its fields have to fit each other and the model."""
    recipe = SftRecipe.from_file(ROOT / "configs" / "sft-flash-lora-mxfp4.yaml")
    assert recipe.model.n_routed_experts % recipe.parallel.expert == 0
    assert recipe.training.expert_weight_format == "mxfp4" and recipe.training.linear_cross_entropy
    assert recipe.lora and not recipe.export


def test_adapters_are_trained_left_and_merged(tmp_path, finished):
    """LoRA on the weights of a run: an adapter beside the log, and weights in which it has been added."""
    base = finished[1] / "weights"
    recipe = sft_recipe(tmp_path, weights=str(base), lora={"r": 2})
    assert run(recipe, "--steps", "2", "--out", tmp_path / "tuned") == 0
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").exists()
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (base, tmp_path / "tuned" / "weights"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.endswith("weight") and "layernorm" not in name for name in changed), changed
