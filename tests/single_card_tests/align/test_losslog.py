"""The log model, and reading back what was written."""

import hashlib
import json
import struct

import numpy as np
import pytest
from synthetic import entry, float32, json_lines, positions, read, write

from align.logwriter import LossLogWriter
from align.losslog import loss_md5, loss_text, pack, unpack
from paddledsv4.errors import UserError


def test_md5_is_of_the_four_float32_bytes():
    assert (
        loss_md5(6.25567340850830078125) == "42bf3d0134965450ba7ec96cb96776b5"
    )  # from the Megatron recording
    assert loss_md5(0.1) == hashlib.md5(struct.pack("<f", 0.1)).hexdigest()


def test_positions_pack_in_order():
    keys = [pack(*position) for position in positions(3, 4, 5)]
    assert keys == sorted(keys)
    assert [unpack(key) for key in keys] == list(positions(3, 4, 5))
    for wrong in ((0, 0, 0), (1, 1 << 16, 0), (1, 0, 1 << 16), (1 << 31, 0, 0)):
        with pytest.raises(ValueError):
            pack(*wrong)


def test_twenty_decimals_read_back_exactly():
    values = np.random.default_rng(0).uniform(1e-3, 20, 2000).astype(np.float32)
    assert all(np.float32(float(loss_text(float(value)))) == value for value in values)


def test_written_log_reads_back(tmp_path):
    path = tmp_path / "new" / "losses.jsonl"
    values = {(1, 0, 0): (float32(6.1), float32(6.3)), (1, 1, 0): (float("inf"), float("nan"))}
    with LossLogWriter(path, {"policy_fingerprint": "abc"}) as writer:
        for position, (main, mtp) in values.items():
            writer.losses(*position, main, mtp)
        writer.grad_norm(1, 0.5)
        writer.final_weights("0" * 32)
        assert not path.exists()  # nothing to see before the end
    assert [p.name for p in path.parent.iterdir()] == ["losses.jsonl"]
    assert json.loads(path.read_text().splitlines()[0]) == {"run": {"policy_fingerprint": "abc"}}
    log, issues = read(path)
    assert issues == [] and log.header == {"policy_fingerprint": "abc"} and log.final_weights_md5 == "0" * 32
    assert [unpack(key) for key in log.main.keys] == list(values)
    assert log.main.values.tolist() == [float32(6.1), float("inf")]
    assert log.mtp.values[0] == float32(6.3) and np.isnan(log.mtp.values[1])
    assert log.main.md5(0) == loss_md5(float32(6.1))
    assert log.grad_norms.values.tolist() == [0.5]


def test_a_failing_run_leaves_nothing_new_and_the_old_log(tmp_path):
    with pytest.raises(RuntimeError), LossLogWriter(tmp_path / "a" / "b" / "losses.jsonl", {}) as writer:
        writer.grad_norm(1, 1.0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    old = write(tmp_path / "losses.jsonl", ["old"])
    with pytest.raises(KeyboardInterrupt), LossLogWriter(old, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "old\n"


def test_an_unwritable_place_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write"),
        LossLogWriter(tmp_path / "file" / "x" / "losses.jsonl", {}),
    ):
        pass
    (tmp_path / "losses.jsonl").mkdir()
    with pytest.raises(UserError, match="is a directory"), LossLogWriter(tmp_path / "losses.jsonl", {}):
        pass


def test_fast_and_careful_json_readers_agree(tmp_path):
    lines = json_lines(20, 3, 2)
    plain, issues = read(write(tmp_path / "plain.jsonl", lines))
    spelled = [json.dumps(json.loads(line), separators=(",", ":")) for line in reversed(lines)]
    careful, more = read(write(tmp_path / "spelled.jsonl", spelled))
    assert issues == more == [] and len(plain.main) == 120
    for kind in ("main", "mtp", "grad_norms"):
        one, other = getattr(plain, kind), getattr(careful, kind)
        for column in ("keys", "values", "md5s"):
            assert np.array_equal(getattr(one, column), getattr(other, column))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("garbage", "malformed"),
        ("[1]", "not a JSON object"),
        ('{"loss": 1}', "neither a loss"),
        (json.dumps(entry(1, 0, 0) | {"step": "1"}), "step must be a whole number"),
        (json.dumps(entry(1, 0, 0) | {"step": 0}), "out of range"),
        (json.dumps(entry(1, 0, 0) | {"step": True}), "step must be a whole number"),
        (json.dumps(entry(1, 0, 0) | {"main_loss": "6,2"}), "no number"),
        (json.dumps(entry(1, 0, 0) | {"main_loss": "1_0"}), "no number"),
        (json.dumps(entry(1, 0, 0) | {"main_md5": "ab"}), "32 hexadecimal"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_malformed_json_lines_are_told_with_their_number(tmp_path, bad, says):
    lines = json_lines(2)
    _, issues = read(write(tmp_path / "log.jsonl", [*lines[:3], bad, *lines[3:]]))
    assert len(issues) == 1 and "log.jsonl:4: " in issues[0] and says in issues[0]


def test_truncated_last_line(tmp_path):
    lines = json_lines(2)
    _, issues = read(write(tmp_path / "log.jsonl", [*lines, lines[0][:50]], end=""))
    assert len(issues) == 1 and "log.jsonl:7: the last line is truncated" in issues[0]


def test_duplicates_and_conflicts(tmp_path):
    lines = json_lines(2)
    _, issues = read(write(tmp_path / "log.jsonl", [*lines, lines[1]]))
    assert (
        len(issues) == 2 and "log.jsonl:7: duplicate main loss of step 1, microbatch 1, rank 0" in issues[0]
    )
    assert "line 2" in issues[0]
    log, issues = read(write(tmp_path / "log.jsonl", [*lines, json.dumps(entry(1, 1, 0, main=9.0))]))
    assert "conflicting main loss" in issues[0] and "duplicate MTP loss" in issues[1]
    assert len(log.main) == len(log.mtp) == 4 and 9.0 not in log.main.values  # the first telling counts


def test_blank_lines_and_carriage_returns(tmp_path):
    log, issues = read(write(tmp_path / "log.jsonl", ["", *json_lines(2)]))
    assert issues == [] and len(log.main) == 4
    (tmp_path / "log.jsonl").write_bytes(("\r\n".join(json_lines(2)) + "\r\n").encode())
    log, issues = read(tmp_path / "log.jsonl")
    assert issues == [] and len(log.main) == 4
