"""What counts as a match, and how the outcome is told."""

import json

import pytest
from synthetic import entry, final_lines, float32, json_lines, positions, read, write

from align.compare import compare_logs
from align.issues import Issues
from align.losslog import loss_text
from paddledsv4.errors import UserError


def log_of(path, *entries):
    return read(write(path, [json.dumps(one) for one in entries]))[0]


@pytest.fixture
def reference(tmp_path):
    return read(write(tmp_path / "ref.jsonl", json_lines(3)))[0]


def candidate(tmp_path, lines):
    return read(write(tmp_path / "cand.jsonl", lines))[0]


def test_equal_logs_render_exactly(tmp_path, reference):
    result = compare_logs(reference, candidate(tmp_path, json_lines(3)), 3)
    last = entry(3, 1, 0)
    assert result.exit_code == 0
    assert result.render().splitlines()[-8:] == [
        "main_matches=6/6",
        "mtp_matches=6/6",
        "first_main_diff=None",
        "first_mtp_diff=None",
        "max_main_abs_diff=0 max_main_ulp=0",
        "max_mtp_abs_diff=0 max_mtp_ulp=0",
        f"step3 main final_loss={last['main_loss']} md5={last['main_md5']}",
        f"step3 mtp final_loss={last['mtp_loss']} md5={last['mtp_md5']}",
    ]


def test_order_of_lines_does_not_matter(tmp_path, reference):
    assert compare_logs(reference, candidate(tmp_path, json_lines(3)[::-1])).ok


@pytest.mark.parametrize("planted", list(positions(3)))
def test_a_wrong_digit_is_found(tmp_path, reference, planted):
    lines = [
        json.dumps(entry(*p, main=entry_value(p) + 1e-6 if p == planted else None)) for p in positions(3)
    ]
    result = compare_logs(reference, candidate(tmp_path, lines))
    assert (result.main.matches, result.mtp.matches, result.exit_code) == (5, 6, 1)
    assert result.main.first_diff == planted and result.mtp.first_diff is None
    assert 0 < result.main.max_ulp < 50 and result.main.max_abs_diff == pytest.approx(1e-6, rel=0.5)


def entry_value(position):
    return float(entry(*position)["main_loss"])


def test_values_must_not_contradict_equal_md5s(tmp_path, reference):
    entries = [entry(*p) for p in positions(3)]
    entries[2]["main_loss"] = loss_text(entry_value((2, 0, 0)) + 1e-3)
    result = compare_logs(reference, log_of(tmp_path / "c.jsonl", *entries))
    assert result.main.matches == 5 and result.main.first_diff == (2, 0, 0)


def test_md5s_decide_where_values_agree(tmp_path, reference):
    entries = [entry(*p) for p in positions(3)]
    entries[2]["main_md5"] = "0" * 31 + "1"
    result = compare_logs(reference, log_of(tmp_path / "c.jsonl", *entries))
    assert result.main.matches == 5 and result.exit_code == 1 and result.main.max_ulp == 0


def test_values_decide_without_md5s(tmp_path, reference):
    entries = [entry(*p) for p in positions(3)]
    for one in entries:
        del one["main_md5"], one["mtp_md5"]
    result = compare_logs(reference, log_of(tmp_path / "c.jsonl", *entries))
    assert result.ok and result.last_main.md5 == entry(3, 1, 0)["main_md5"]


def test_nan_never_matches(tmp_path):
    nan = entry(1, 0, 0, main=float("nan"))
    left, right = (log_of(tmp_path / f"{name}.jsonl", nan) for name in "ab")
    result = compare_logs(left, right)
    assert left.main.md5(0) == right.main.md5(0)
    assert (result.main.matches, result.main.first_diff, result.mtp.matches) == (0, (1, 0, 0), 1)
    assert "max_main_abs_diff=nan max_main_ulp=nan" in result.render() and result.exit_code == 1


@pytest.mark.parametrize(("norm", "told"), [(1.5, "equal MD5s"), (float("nan"), "not compared, a gradient norm is")])
def test_weights_that_are_nan_are_not_called_equal(tmp_path, norm, told):
    lines = [{"step": 1, "grad_norm": norm}, {"final_weights_md5": "0" * 32}]
    logs = [log_of(tmp_path / f"{name}.jsonl", entry(1, 0, 0), *lines) for name in "ab"]
    notes = compare_logs(*logs).render()
    assert f"final weights: {told}" in notes and ("1 of 1 equal" in notes) == (told == "equal MD5s")


@pytest.mark.parametrize("piece", [1, 2])
def test_nan_is_not_hidden_by_other_differences(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("align.compare.PIECE", piece)
    left = log_of(tmp_path / "a.jsonl", entry(1, 0, 0), entry(1, 1, 0))
    right = log_of(tmp_path / "b.jsonl", entry(1, 0, 0, main=9.0), entry(1, 1, 0, main=float("nan")))
    assert "max_main_abs_diff=nan max_main_ulp=nan" in compare_logs(left, right).render()


def test_infinities(tmp_path):
    inf = log_of(tmp_path / "a.jsonl", entry(1, 0, 0, main=float("inf")))
    assert compare_logs(inf, log_of(tmp_path / "b.jsonl", entry(1, 0, 0, main=float("inf")))).ok
    largest = log_of(tmp_path / "b.jsonl", entry(1, 0, 0, main=3.4028234663852886e38))
    assert "max_main_abs_diff=inf max_main_ulp=1" in compare_logs(inf, largest).render()


def test_a_candidate_that_stops_early(tmp_path, reference):
    result = compare_logs(reference, candidate(tmp_path, [json.dumps(entry(*p)) for p in positions(2)]))
    assert (result.main.matches, result.main.expected, result.main.first_diff) == (4, 6, (3, 0, 0))
    assert result.exit_code == 1 and "step2 main final_loss=" in result.render()
    assert any("2 of 6 main losses are missing" in issue for issue in result.issues)


def test_both_stopping_early_is_no_success(tmp_path, reference):
    same = candidate(tmp_path, json_lines(3))
    assert compare_logs(reference, same).ok
    result = compare_logs(reference, same, expected_steps=100)
    assert result.exit_code == 1 and len(list(result.issues)) == 2
    assert all("3 steps, but 100 are expected" in issue for issue in result.issues)


def test_only_expected_steps_count(tmp_path, reference):
    result = compare_logs(reference, candidate(tmp_path, json_lines(2)), expected_steps=2)
    assert result.ok and result.main.expected == 4


def test_entries_that_the_reference_lacks(tmp_path, reference):
    result = compare_logs(reference, candidate(tmp_path, json_lines(4)))
    assert result.main.matches == 6 and result.exit_code == 1


def test_an_empty_candidate(tmp_path, reference):
    result = compare_logs(reference, candidate(tmp_path, [""]))
    assert result.main.matches == 0 and "max_main_abs_diff=None" in result.render()
    assert "step0 main final_loss=None md5=None" in result.render()


def test_an_empty_reference_is_bad_input(tmp_path, reference):
    with pytest.raises(UserError, match="nothing to compare"):
        compare_logs(candidate(tmp_path, [""]), reference)


def test_reading_issues_fail_the_comparison(tmp_path, reference):
    issues = Issues("x.jsonl")
    issues.add("duplicate", line=3)
    result = compare_logs(reference, reference, issues=issues)
    assert result.exit_code == 1 and "issue: x.jsonl:3: duplicate" in result.render()


def test_float64_run_matches_in_float32(tmp_path):
    value = float32(6.1)
    left = log_of(tmp_path / "a.jsonl", entry(1, 0, 0, main=value))
    right = log_of(tmp_path / "b.jsonl", entry(1, 0, 0, main=value + 1e-9))
    result = compare_logs(left, right)
    assert result.main.matches == 1 and 0 < result.main.max_abs_diff < 2e-9 and result.main.max_ulp == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "step", "final", "path"])
def test_a_million_lines(tmp_path, form):
    """Two logs of a million lines in a fresh process, imports included: below 5 s of processor and 200 MB."""
    from benchmarks.compare_logs import measure, write_log

    logs = [tmp_path / f"{side}.{form}" for side in "ab"]
    microbatches = [write_log(log, form, 1_000_000) for log in logs][0]
    _, cpu_seconds, peak_mb = measure(*logs, microbatches)
    assert cpu_seconds < 5 and peak_mb < 200


def test_text_and_json_compare(tmp_path, reference):
    log, issues = read(write(tmp_path / "log.txt", final_lines(3)), microbatches=2)
    assert not issues and compare_logs(reference, log).ok
