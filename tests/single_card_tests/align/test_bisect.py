"""align bisect: planted switches are found by real runs, and what is no switch is told as such."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from synthetic import make_bundle
from trained import recorded_bundle
from typer.testing import CliRunner

from align.bisect.attribution import Plan, bisect
from align.bisect.budget import Budget, BudgetSpent
from align.bisect.layers import layer_of
from align.bisect.result import Verdict
from align.bisect.runs import FOLDER
from align.bisect.search import find_switches
from align.bisect.switches import Switches, parse_policy
from align.bisect.trial import Outcome, Trial
from align.bisect.watch import BarWatch, LineWatch
from align.bundle import load_bundle
from align.cli import app
from align.losslog import loss_md5, loss_text
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.training.trainer import Trainer

TO = Policy.preset("megatron")
OPS = sorted(TO.choices)
# In the recorded model, the paddle variant of each of these gives other weights than the megatron variant.
TELLING = (
    "adamw", "cross_entropy", "hc_aggregate", "hc_gates", "hc_project", "head_norm", "linear", "rms_norm",
    "router_logits", "router_scores", "sinkhorn", "sparse_attention", "swiglu",
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recorded_bundle(tmp_path_factory.mktemp("bundles") / "recorded", TO)


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["bisect", *map(str, words)])


# ---- real runs


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_three_planted_among_all_switches_are_found(recorded, seed):
    trial, asked = Trial(load_bundle(recorded), 3, "fp32"), []
    weights = trial.run(TO).weights
    planted = set(random.Random(seed).sample(TELLING, 3))

    def equal(flipped):
        asked.append(flipped)
        policy = Policy.preset("megatron", {op: "paddle" for op in planted - flipped})
        return trial.run(policy, weights).same(weights)

    order = list(OPS)
    random.Random(seed).shuffle(order)  # no help from the order
    assert find_switches(equal, order) == planted
    assert len(asked) <= 4 * 3 * math.log2(len(OPS))


def test_from_the_command_line_and_again(align, recorded, tmp_path):
    words = (recorded, "--from", "megatron,adamw=paddle", "--op", "hc_gates=paddle,rope=paddle", "--to", "megatron")
    result = align(*words, "--layers", "--out", "out")
    assert result.exit_code == 0, result.stderr
    said = json.loads((tmp_path / "out" / "bisect.json").read_text())
    assert said["minimal_set"] == ["hc_gates", "adamw"] and said["verdict"] == "attributed"
    rows = {row["op"]: row for row in said["switches"]}
    assert list(rows) == ["hc_gates", "adamw", "rope"]  # the one that cannot differ comes last
    assert rows["rope"]["first_differing_step"] is None and rows["rope"]["max_loss_difference"] == 0
    assert rows["hc_gates"]["first_differing_step"] in (1, 2, 3) and rows["hc_gates"]["max_loss_difference"] > 0
    assert rows["adamw"]["first_differing_weights_step"] == 1
    assert all(isinstance(row["seconds_per_step"], float) for row in rows.values())
    assert {row["layer"] for row in said["layers"]} == {"decoder.layers.0", "decoder.layers.1"}
    assert "hc_gates, adamw" in result.stdout and "hc_gates=megatron,adamw=megatron,rope=paddle" in result.stdout

    again = align(*words, "--layers", "--out", "out", "--json")
    repeated = json.loads(again.stdout)
    assert again.exit_code == 0 and repeated["new_runs"] == 0 and repeated["runs"] == said["runs"]
    assert repeated["switches"] == said["switches"] and "(earlier run)" in again.stderr


def test_a_fault_that_is_no_switch_is_told(align, recorded, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in recorded.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    *lines, last = (recorded / "losses.jsonl").read_text().splitlines()
    entry = json.loads(last)
    other = float(entry["main_loss"]) * (1 + 2**-22)
    entry |= {"main_loss": loss_text(other), "main_md5": loss_md5(other)}
    (broken / "losses.jsonl").write_text("\n".join([*lines, json.dumps(entry)]) + "\n")
    result = align(broken, "--from", "paddle", "--to", "megatron")
    assert result.exit_code == 1 and "not in a switch" in result.stdout and "align locate" in result.stdout
    said = json.loads((tmp_path / "runs" / "recorded-paddle-fp32" / "bisect.json").read_text())
    assert said["minimal_set"] is None and said["verdict"] == "not explained by switches" and said["runs"] == 2


def test_a_run_that_is_equal_already(align, recorded):
    result = align(recorded, "--from", "megatron", "--op", "rope=paddle", "--to", "megatron", "--steps", "1")
    assert result.exit_code == 0 and "equal as it is" in result.stdout


def test_a_variant_that_fails_is_an_outcome(recorded):
    def fails(*_, **__):
        raise RuntimeError("no such\nkernel")

    trial = Trial(load_bundle(recorded), 2, "fp32")
    policy = SimpleNamespace(ops=lambda *_, **__: SimpleNamespace(**dict.fromkeys(OPS, fails)), check_layers=set)
    outcome = trial.run(policy)
    assert outcome.error == "RuntimeError: no such kernel" and not outcome.equal and outcome.same(()) is False


def test_equal_losses_with_a_gradient_that_is_nan_are_not_equal(recorded, monkeypatch):
    """The weights are NaN then, with one MD5 on both sides."""
    trial = Trial(load_bundle(recorded), 2, "fp32")
    policy = Policy.preset("megatron")
    assert trial.run(policy).equal
    train = Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda *a, **k: (replace(result, grad_norm=float("nan")) for result in train(*a, **k))
    )
    outcome = trial.run(policy)
    assert outcome.error == "the gradient norm of step 1 is nan" and outcome.same(()) is False


# ---- the plan, with a trial that does not train


class Rule:
    """Gives what ``outcome(ops that are not megatron's)`` says."""

    def __init__(self, path, outcome):
        self.bundle, self.steps, self.precision, self.outcome, self.ran = load_bundle(path), 3, "fp32", outcome, 0

    def run(self, policy, like=None):
        self.ran += 1
        return self.outcome({op for op, choice in policy.choices.items() if choice != "megatron"})


def equal_without(*culprits):
    good, bad = ("a", "b", "c"), ("a", "x", "x")

    def outcome(wrong):
        if not wrong & set(culprits):
            return Outcome(equal=True, weights=good, max_difference=0.0, seconds_per_step=2.0)
        return Outcome(equal=False, first=("mtp", 2, 1, 0), weights=bad, max_difference=0.25, seconds_per_step=1.5)

    return outcome


@pytest.fixture
def attribute(tmp_path):
    path = make_bundle(tmp_path / "b")
    switches = Switches.between(Policy.preset("paddle"), TO)

    def run(outcome, budget=None, plan=Plan()):
        trial = Rule(path, outcome)
        return bisect(trial, switches, tmp_path / "out", Budget.parse(budget), LineWatch(), plan), trial

    return run


def test_flips_say_what_each_switch_does(attribute):
    result, trial = attribute(equal_without("linear", "rope"))
    assert result.verdict == Verdict.ATTRIBUTED and result.minimal == ["linear", "rope"] and result.exit_code == 0
    flips = {flip.name: flip.as_dict() for flip in result.flips}
    assert len(flips) == len(OPS) and result.runs == result.new_runs == trial.ran == len(OPS) + 2 + 3
    assert flips["linear"] == {
        "op": "linear", "from": "paddle", "to": "megatron", "first_differing_step": 2,
        "first_differing_weights_step": 2, "max_loss_difference": 0.25, "seconds_per_step": 0.5, "nan": False,
        "error": None, "first_difference": {"loss": "mtp", "step": 2, "microbatch": 1, "rank": 0},
    }  # fmt: skip
    assert flips["swiglu"]["first_differing_step"] is None and flips["swiglu"]["seconds_per_step"] == 0


def test_without_flips_few_switches_take_few_runs(attribute):
    result, trial = attribute(equal_without("linear", "rope"), plan=Plan(flips=False))
    assert result.minimal == ["linear", "rope"] and not result.flips and trial.ran <= 30


def test_a_spent_budget_keeps_what_is_known(attribute):
    first, trial = attribute(equal_without("linear"), budget="7")
    assert trial.ran == 7 and first.verdict == Verdict.UNFINISHED and first.exit_code == 1 and first.minimal is None
    assert len(first.flips) == 5 and "goes on" in " ".join(first.explain("b"))
    second, trial = attribute(equal_without("linear"), budget="1000")
    assert second.minimal == ["linear"] and trial.ran == second.new_runs == second.runs - 7


def test_interrupted_runs_are_taken_up_and_damaged_ones_repeated(attribute, tmp_path):
    good, seen = equal_without("linear"), []

    def interrupted(wrong):
        seen.append(wrong)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return good(wrong)

    with pytest.raises(KeyboardInterrupt):
        attribute(interrupted)
    kept = sorted((tmp_path / "out" / FOLDER).iterdir())
    assert len(kept) == 5 and not (tmp_path / "out" / "bisect.json").exists()
    kept[0].write_text(kept[0].read_text()[:20])
    result, trial = attribute(good)
    assert result.minimal == ["linear"] and trial.ran == result.runs - 4


def test_another_bundle_or_number_of_steps_is_another_run(attribute, tmp_path):
    attribute(equal_without("linear"))
    (tmp_path / "b" / "losses.jsonl").write_text((tmp_path / "b" / "losses.jsonl").read_text() + "\n")
    result, trial = attribute(equal_without("linear"))
    assert trial.ran == result.runs


def test_nan_and_failures_are_told_and_do_not_stop_the_rest(attribute):
    usual = equal_without("linear", "swiglu", "add")

    def outcome(wrong):
        if "swiglu" in wrong:
            nan = float("nan")
            return Outcome(equal=False, first=("main", 1, 0, 0), weights=("n",) * 3, max_difference=nan)
        return Outcome(equal=False, error="RuntimeError: no kernel") if "add" in wrong else usual(wrong)

    result, _ = attribute(outcome)
    flips = {flip.name: flip.as_dict() for flip in result.flips}
    assert flips["swiglu"]["nan"] and flips["swiglu"]["max_loss_difference"] is None
    assert flips["add"]["error"] == "RuntimeError: no kernel" and flips["add"]["first_differing_step"] is None
    assert set(result.minimal) == {"linear", "swiglu", "add"} and "NaN" not in json.dumps(result.as_dict())


def test_a_reference_side_that_fails_is_an_error(attribute):
    with pytest.raises(UserError, match="--to megatron fails: broken"):
        attribute(lambda wrong: Outcome(equal=False, error="broken"))


def test_losses_that_are_equal_by_chance_explain_nothing(attribute):
    """What linear does wrong, add happens to hide from the losses, but not from the weights."""

    def outcome(wrong):
        equal = "rope" not in wrong and ("linear" not in wrong or "add" in wrong)
        return Outcome(equal=equal, weights=("x" if wrong & {"linear", "rope"} else "a",) * 3, max_difference=0.0)

    assert attribute(outcome)[0].minimal == ["linear", "rope"]
    assert attribute(outcome, plan=Plan(weights=False))[0].minimal == ["rope"]


# ---- parts


def test_policies_as_text(monkeypatch):
    monkeypatch.setenv("PADDLEDSV4_SWIGLU", "plain")
    policy = parse_policy("megatron, sinkhorn=paddle, decoder.layers.2.*:linear=paddle")
    assert (policy.choices["sinkhorn"], policy.choices["swiglu"]) == ("paddle", "megatron") and len(policy.layers) == 1
    assert parse_policy("megatron", environment=True).choices["swiglu"] == "plain"
    assert parse_policy("", environment=True).name == "paddle"
    rules = Switches.between(policy, TO)
    assert set(rules.names) == {"layers", "sinkhorn"}
    assert rules.flipped({"layers"}).layers == () and rules.flipped({"sinkhorn"}).layers == policy.layers


def test_a_layer_by_its_path():
    assert layer_of("decoder.layers.2.mlp.router") == layer_of("decoder.layers.2") == "decoder.layers.2"
    assert layer_of("mtp.layers.0.transformer_layer.mlp") == "mtp.layers.0" and layer_of("decoder") == "decoder"
    switches = Switches.between(Policy.preset("paddle"), TO)
    in_one = switches.all_but_in("decoder.layers.1", "linear")
    assert in_one.at("decoder.layers.1.mlp")["linear"] == "paddle"
    assert in_one.at("decoder.layers.10.mlp")["linear"] == in_one.at("")["linear"] == "megatron"
    assert switches.all_but_in("decoder", "hc_expand").at("decoder.layers.0")["hc_expand"] == "megatron"


def test_budgets():
    assert (Budget.parse(None).runs, Budget.parse(None).seconds) == (None, None)
    assert Budget.parse("40").runs == 40 and Budget.parse("1.5h").seconds == 5400 and Budget.parse("90s").seconds == 90
    late = Budget(seconds=1, began=-1e9)
    with pytest.raises(BudgetSpent):
        late.spend()


def test_a_bar_shows_progress():
    with BarWatch() as watch:
        watch.phase("one switch at a time", 2)
        watch.begins("without linear")
        watch.ended("without linear", "equal", False)
        assert watch.bar.tasks[0].completed == 1 and "without linear: equal" in watch.bar.tasks[0].fields["what"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from", "torch", "--to", "torch"], "there is no switch"),
        (["--from", "fast"], "'fast' is unknown"),
        (["--from", "sinkhorn=paddle"], "start with a preset"),
        (["--to", ""], "start with a preset"),
        (["--from", "paddle,sinkhorn=fast"], "no variant 'fast'"),
        (["--op", "sinkhron=paddle"], "no op 'sinkhron'"),
        (["--budget", "0"], "--budget 0"),
        (["--budget", "soon"], "--budget soon"),
        (["--budget", "10x"], "--budget 10x"),
        (["--steps", "99"], "--steps 99"),
        (["--to", "megatron", "--out", "file"], "cannot make"),
    ],
)
def test_mistakes_are_one_line(align, recorded, tmp_path, words, says):
    (tmp_path / "file").write_text("")
    result = align(recorded, *words)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
