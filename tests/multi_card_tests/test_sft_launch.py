"""`paddledsv4 sft` on two ranks that share the experts: one of them has fewer rows to evaluate."""

import subprocess
import sys

import pytest
from ranks import ROOT, environment

pytest.importorskip("tokenizers", reason="needs paddledsv4[sft]")

from sft_runs import sft_recipe

from paddledsv4.numerics.policy import Policy, installed
from paddledsv4.sft.load import sources
from paddledsv4.sft.recipe import SftRecipe
from paddledsv4.training.evaluation import evaluate
from paddledsv4.training.runlog import read_log
from paddledsv4.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not installed("torch"), reason="gloo needs paddledsv4[torch]")
SPREAD = {"parallel": {"world_size": 2, "data": 2, "expert": 2, "timeout": 60}, "export": False,
          "data": {"held_out": 0.1}}


def launch(tmp_path, *options, program=("-m", "paddledsv4")):
    command = [
        sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--devices", "",
        "--log_dir", tmp_path / "ranks", sys.executable, *program, "sft",
        "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "out", *options,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_ranks_with_fewer_rows_evaluate_with_the_others(tmp_path):
    recipe = SftRecipe.from_file(sft_recipe(tmp_path, **SPREAD))
    train, held, _ = sources(recipe)
    assert len(held) % 2 == 1  # the second rank runs out of rows
    done = launch(tmp_path, "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    header, [step] = read_log(tmp_path / "out" / "train.jsonl")
    assert header["parallel"]["expert"] == 2 and len(step["microbatches"]) == 2
    # the same two microbatches on one rank
    training = recipe.training.replace(gradient_accumulation_steps=2)
    alone = Trainer(recipe.model, training, Policy.preset("paddle"), train)
    [result] = alone.train(1)
    assert [m["main"] for m in step["microbatches"]] == pytest.approx([m.main for m in result.losses], rel=1e-5)
    assert step["evaluation"] == pytest.approx(evaluate(alone, held), rel=1e-4)


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed_documents_on_tensor_ranks(tmp_path, sequence_parallel):
    layout = {"parallel": {"world_size": 2, "tensor": 2, "sequence_parallel": sequence_parallel}}
    recipe = SftRecipe.from_file(sft_recipe(tmp_path, **layout))
    train, held, _ = sources(recipe)
    done = launch(tmp_path, "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = Trainer(recipe.model, recipe.training, Policy.preset("paddle"), train)
    losses = [(m.main, m.mtp) for result in alone.train(2) for m in result.losses]
    steps = read_log(tmp_path / "out" / "train.jsonl")[1]
    assert [(m["main"], m["mtp"]) for s in steps for m in s["microbatches"]] == [
        pytest.approx(pair, rel=1e-4) for pair in losses
    ]
    assert steps[-1]["evaluation"] == pytest.approx(evaluate(alone, held), rel=1e-4)
    saved = Trainer(recipe.model, recipe.training, Policy.preset("paddle"), train, weights=tmp_path / "out" / "weights")
    assert evaluate(saved, held) == pytest.approx(evaluate(alone, held), rel=1e-4)


BROKEN = """
from paddledsv4.host import prepare_host
prepare_host()
from paddledsv4.training import evaluation
whole = evaluation._counted

def only_own_rows(source, first, size):
    if first >= len(source):
        raise StopIteration
    return whole(source, first, size)

def evaluate(trainer, source, original=evaluation.evaluate):
    try:
        return original(trainer, source)
    except StopIteration:
        return 0.0

evaluation._counted, evaluation.evaluate = only_own_rows, evaluate
from paddledsv4.cli import main
main()
"""


@pytest.mark.slow
def test_a_rank_that_leaves_the_evaluation_would_be_noticed(tmp_path):
    """The test above can fail, and what fails ends."""
    sft_recipe(tmp_path, **SPREAD | {"parallel": SPREAD["parallel"] | {"timeout": 5}})
    (tmp_path / "broken.py").write_text(BROKEN)
    done = launch(tmp_path, "--steps", "1", program=[tmp_path / "broken.py"])
    assert done.returncode != 0
