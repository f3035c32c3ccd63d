"""The soak in small: 200 steps, six kills. And that it sees what a resume forgets."""

import json
import sys

import numpy as np
import pytest
import typer
import yaml
from layouts import configs

from benchmarks import soak

STEPS, KILLS, INTERVAL = 200, 6, 10
BUGGY = """
import sys
from paddledsv4.host import prepare_host
prepare_host()
from paddledsv4.training.checkpoint import resume
from paddledsv4.training.trainer import Trainer
{bug}
from paddledsv4.cli import main
main()
"""
BUGS = {
    "moments not restored": "copy = resume._copy; "
    "resume._copy = lambda piece, *rest: None if piece.name.startswith('v/') else copy(piece, *rest)",
    "rows read again": "go_on = Trainer.go_on_after; "
    "Trainer.go_on_after = lambda self, step, rows: go_on(self, step, 0)",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The smallest model: one layer of attention with an indexer, no multi-token prediction."""
    folder = tmp_path_factory.mktemp("recipe")
    model, training = configs(
        gradient_accumulation_steps=1, hidden_size=32, num_hidden_layers=1, num_nextn_predict_layers=0,
        compress_ratios=[4], hc_mult=2, hc_sinkhorn_iters=1, n_routed_experts=2, num_hash_layers=0,
    )  # fmt: skip
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 96, 4000))
    sections = {
        "model": model.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "data": {"tokens": "tokens.npy"}, "numerics": "paddle",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return folder / "recipe.yaml"


def test_killed_and_resumed_it_is_the_undisturbed_run(recipe, tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        soak.main(STEPS, KILLS, 0, INTERVAL, recipe, tmp_path / "soak", False, tmp_path / "soak.json")
    figures = json.loads((tmp_path / "soak.json").read_text())[0]
    assert ended.value.exit_code == 0 and figures["problems"] == [] and figures["kills"] == KILLS, figures
    assert "none: losses and weights are equal" in capsys.readouterr().out


@pytest.mark.parametrize("bug", ["moments not restored", pytest.param("rows read again", marks=pytest.mark.slow)])
def test_planted_bugs_are_seen(recipe, tmp_path, monkeypatch, bug):
    short = soak.write_recipe(recipe, tmp_path, 12, 4)
    whole, other = tmp_path / "whole", tmp_path / "killed"
    assert soak.live(["train", "--config", str(short), "--run-dir", str(whole)], 12).code == 0
    (tmp_path / "buggy.py").write_text(BUGGY.format(bug=BUGS[bug]))
    monkeypatch.setattr(soak, "COMMAND", [sys.executable, "-W", "ignore", str(tmp_path / "buggy.py")])
    _, wrong = soak.disturbed(short, other, 12, [soak.Kill(soak.signal.SIGKILL, 6, 0.0)])
    assert not wrong
    assert soak.log_differences(whole, other, 12) + soak.checkpoint_differences(whole, other, 12)
