"""The text formats of trainers, and giving positional lines their steps."""

import random

import numpy as np
import pytest
from synthetic import final_lines, json_lines, loss, path_lines, positions, read, step_lines, write

from align.compare import compare_logs
from align.losslog import unpack
from align.readlog import read_pair

FORMATS = {"final": final_lines, "path": path_lines, "step": step_lines}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path, name, ranks):
    path = write(tmp_path / "log.txt", FORMATS[name](4, 2, ranks))
    log, issues = read(path, microbatches=2)
    assert issues == []
    assert [unpack(key) for key in log.main.keys] == list(positions(4, 2, ranks))
    for kind, series in (("main", log.main), ("mtp", log.mtp)):
        assert series.values.tolist() == [loss(*position, kind) for position in positions(4, 2, ranks)]


@pytest.mark.parametrize("name", FORMATS)
def test_surrounding_text_and_glued_lines(tmp_path, name):
    lines = FORMATS[name](2)
    noisy = [f"[default0]: 12:00 INFO {line} | lr 1e-3" for line in lines]
    noisy = ["loss scale 1.0", *noisy, "final losses are saved", "per token", "step 3 of 9"]
    log, issues = read(write(tmp_path / "log.txt", noisy), microbatches=2)
    assert issues == [] and len(log.main) == len(log.mtp) == 4
    if name != "step":
        log, issues = read(write(tmp_path / "log.txt", ["".join(lines[:4]), *lines[4:]]), microbatches=2)
        assert issues == [] and len(log.main) == len(log.mtp) == 4


@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
def test_inf_and_nan_do_not_vanish(tmp_path, text):
    md5 = "0123456789abcdef" * 2
    lines = {
        "step": [f"step 1 mb 0 loss {text} md5 {md5} mtp {text} md5 {md5}"],
        "final": [f"final_loss: rank=0 val={text} md5={md5}", f"final_loss: rank=0 val=1.0 md5={md5}"],
    }
    for written in lines.values():
        log, issues = read(write(tmp_path / "log.txt", written))
        assert issues == [] and np.array_equal(log.main.values, [float(text)], equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("at", [1, -1])
def test_a_truncated_line_is_told_and_shifts_nothing(tmp_path, name, at):
    lines = FORMATS[name](3)
    reference = read(write(tmp_path / "whole.txt", lines), microbatches=2)[0]
    number = len(lines) if at == -1 else at + 1
    lines[at] = lines[at][:-20]
    log, issues = read(write(tmp_path / "cut.txt", lines, end=""), microbatches=2)
    assert len(issues) == 1 and f"cut.txt:{number}: truncated or malformed" in issues[0]
    result = compare_logs(reference, log)
    lost = result.main.missing + result.mtp.missing
    assert (result.main.matches, result.mtp.matches) in {(6, 5), (5, 6), (5, 5)} and lost in (1, 2)
    assert result.main.max_ulp == result.mtp.max_ulp == 0
    assert result.exit_code == 1


def test_missing_line_is_told(tmp_path):
    lines = [line for line in final_lines(3) if line.startswith("final")]
    _, issues = read(write(tmp_path / "log.txt", lines[:4] + lines[5:]), microbatches=2)
    assert any("11 final_loss lines" in issue and "missing" in issue for issue in issues)
    _, issues = read(write(tmp_path / "log.txt", final_lines(3)[:-1]), microbatches=2)
    assert any("12 per_token_loss lines but 11 final_loss" in issue for issue in issues)


def test_recomputed_lines_are_told_and_shift_nothing(tmp_path):
    lines = [line for line in final_lines(3) if line.startswith("final")]
    reference = read(write(tmp_path / "whole.txt", lines), microbatches=2)[0]
    for repeated in ([*lines[:3], lines[2], *lines[3:]], [*lines[:4], *lines[2:4], *lines[4:]]):
        log, issues = read(write(tmp_path / "again.txt", repeated), microbatches=2)
        assert issues and all("duplicate final_loss line" in issue for issue in issues)
        assert compare_logs(reference, log).main.matches == 6


def test_ranks_of_unequal_length_are_told(tmp_path):
    lines = path_lines(2, 1, 2)
    _, issues = read(write(tmp_path / "log.txt", lines[:-2]), microbatches=1)
    assert any("ranks differ" in issue for issue in issues)


def test_lines_of_ranks_may_interleave_in_any_order(tmp_path):
    reference = write(tmp_path / "ref.jsonl", json_lines(5, 2, 4))
    by_rank = [[line for line in path_lines(5, 2, 4) if f"rank={rank} " in line] for rank in range(4)]
    turns = [rank for rank, lines in enumerate(by_rank) for _ in lines]
    random.Random(0).shuffle(turns)
    shuffled = write(tmp_path / "log.txt", [by_rank[rank].pop(0) for rank in turns])
    (one, found), (other, more) = read_pair(reference, shuffled)
    assert not found and not more and compare_logs(one, other).ok
    steps = step_lines(5, 2, 4)
    random.Random(1).shuffle(steps)
    (one, _), (other, more) = read_pair(reference, write(tmp_path / "log.txt", steps))
    assert not more and compare_logs(one, other).ok


@pytest.mark.parametrize("order", ["main-first", "mtp-first"])
def test_order_is_detected_from_the_other_log(tmp_path, order):
    reference = write(tmp_path / "ref.jsonl", json_lines(4))
    text = write(tmp_path / "log.txt", final_lines(4, order=order))
    for pair in ((reference, text), (text, reference)):
        (one, _), (other, _) = read_pair(*pair)
        assert compare_logs(one, other).ok
    wrong = "mtp-first" if order == "main-first" else "main-first"
    (one, _), (other, _) = read_pair(reference, text, candidate_order=wrong)
    assert compare_logs(one, other).main.matches == 0


def test_order_is_detected_from_the_logs_own_lines(tmp_path):
    lines = final_lines(4, order="mtp-first") + path_lines(4)
    log, issues = read(write(tmp_path / "log.txt", lines), microbatches=2)
    assert issues == [] and log.main.values[0] == loss(1, 0, 0, "main")


def test_disagreeing_formats_in_one_log_are_told(tmp_path):
    lines = step_lines(2) + path_lines(2, 2)
    assert read(write(tmp_path / "log.txt", lines))[1] == []
    lines[0] = step_lines(9)[-1].replace("step 9 mb 1", "step 1 mb 0")
    _, issues = read(write(tmp_path / "log.txt", lines))
    assert len(issues) == 2 and "conflicting main loss of step 1" in issues[0]


@pytest.mark.parametrize(("left", "right"), [("mtp-first", "main-first"), ("main-first", "main-first")])
def test_two_logs_of_positions_follow_the_trainers_convention(tmp_path, left, right):
    one = write(tmp_path / "megatron.txt", final_lines(4, order=left))
    other = write(tmp_path / "paddle.txt", final_lines(4, order=right))
    (ref, found), (cand, more) = read_pair(one, other, microbatches=2)
    result = compare_logs(ref, cand)
    assert not found and not more and result.ok and result.main.expected == 8
    assert ref.main.values[0] == loss(1, 0, 0, "main")
    assert any("--ref-order" in note for note in result.notes)


def test_per_token_md5s_must_agree(tmp_path):
    lines = final_lines(3)
    reference = write(tmp_path / "ref.txt", lines)
    lines = [line.replace(lines[4][-32:], "0" * 31 + "1") for line in lines]
    (one, _), (other, _) = read_pair(reference, write(tmp_path / "cand.txt", lines), 2)
    result = compare_logs(one, other)
    assert result.main.matches == 6 and result.exit_code == 1
    assert any(
        "per_token_loss MD5s differ, first at step 1, microbatch 1" in issue for issue in result.issues
    )


def test_microbatches_are_assumed_aloud(tmp_path):
    log, _ = read(write(tmp_path / "log.txt", path_lines(2)))
    assert log.main.steps() == 4 and any("--microbatches" in note for note in log.notes)


def test_logs_longer_than_a_block(tmp_path):
    path = write(tmp_path / "log.txt", [f"{line} some other text" for line in step_lines(4000)])
    assert path.stat().st_size > 1 << 20
    lines = path.read_text().splitlines()
    lines[7000] = lines[7000].replace(" md5 ", " md ")
    log, issues = read(write(path, lines))
    assert len(log.main) == 7999 and len(issues) == 1 and "log.txt:7001:" in issues[0]
