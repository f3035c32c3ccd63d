"""Bad logs and bundles: never a traceback, never a wrong verdict. Derandomised, so the same cases every time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from synthetic import entry, final_lines, json_lines, make_bundle, path_lines, positions, step_lines

from align.alike import Unlike
from align.bundle import load_bundle
from align.compare import Comparison, compare_logs
from align.issues import Issues
from align.readlog import read_log, read_pair
from align.report.inputs import read_attributions, read_distances
from paddledsv4.errors import UserError

FORMATS = {"json": json_lines, "final": final_lines, "path": path_lines, "step": step_lines}
STEPS = 4
given_cases = settings(
    derandomize=True, deadline=None, max_examples=120, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
formats = st.sampled_from(list(FORMATS))


def verdict(reference: Path, candidate: Path) -> Comparison | UserError:
    """What ``align compare`` says."""
    try:
        (one, found), (other, more) = read_pair(reference, candidate, 2)
        issues = Issues("")
        issues.extend(found)
        issues.extend(more)
        result = compare_logs(one, other, None, issues)
        assert result.render()
        return result
    except UserError as error:
        return error


def accepts(result: Comparison | UserError) -> bool:
    return isinstance(result, Comparison) and result.exit_code == 0


@pytest.fixture
def place(tmp_path):
    """Writes a log under a name that does not tell its format."""

    def write(name: str, lines: list[str] | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode())
        return path

    return write


@pytest.fixture
def careful(monkeypatch):
    """Turns the quick reader off: only the careful ones are left."""

    def off():
        def refuse(*_):
            raise Unlike

        monkeypatch.setattr("align.readjson.tables", refuse)
        monkeypatch.setattr("align.readtext.tables", refuse)

    yield off
    monkeypatch.undo()


@given_cases
@given(st.binary(max_size=300), st.booleans())
@example(b'{"step": 1}\n' * 3, True)
@example(b"step 1 mb 0 loss 1.0 md5 " + b"0" * 32 + b"\n\x00\n", False)
@example(b"final_loss: rank=99999999 val=1.5 md5=" + b"a" * 32 + b"\n", False)
@example(b"step 9999999999 mb 999999999 loss 1.5 md5 " + b"a" * 32 + b" rank=999999999\n", False)
@example(b'{"step": 123456789123456789123, "microbatch": 0, "rank": 0, "main_loss": 1e999}\n', True)
def test_any_bytes(place, data, as_json):
    log = place("x.jsonl" if as_json else "x.log", data)
    assert not accepts(verdict(place("ref.log", json_lines(STEPS)), log))
    assert not accepts(verdict(log, place("ref.log", json_lines(STEPS))))


def same_float32(one: str, other: str) -> bool:
    try:
        with np.errstate(over="ignore"):
            return np.float32(float(one)) == np.float32(float(other))
    except ValueError:
        return False


@given_cases
@given(formats, st.data())
def test_a_changed_byte_of_a_loss_or_md5_never_matches(place, name, data):
    """Every digit counts that changes the float32 or the MD5."""
    lines = FORMATS[name](STEPS)
    number = data.draw(st.integers(0, len(lines) - 1))
    fields = [m for m in re.finditer(r"\b\d+\.\d{20}|\b[0-9a-f]{32}\b", lines[number])]
    fields = [m for m in fields if not re.search(r'loss_sum(_md5)?=$|grad_norm": "$', lines[number][: m.start()])]
    if not fields:
        return
    field = data.draw(st.sampled_from(fields))
    at = data.draw(st.integers(field.start(), field.end() - 1))
    byte = data.draw(st.sampled_from("0123456789abcdefnN.-+ \"\\\r\x00,e"))
    line = lines[number][:at] + byte + lines[number][at + 1 :]
    new = line[field.start() : field.end()]
    if "." in field[0] and same_float32(field[0], new) or line == lines[number]:
        return
    reference, candidate = place("ref.log", lines), place("cand.log", [*lines[:number], line, *lines[number + 1 :]])
    assert not accepts(verdict(reference, candidate)), line


@given_cases
@given(formats, st.data())
def test_lost_repeated_or_cut_lines_never_match(place, name, data):
    lines = [line for line in FORMATS[name](STEPS) if "grad_norm" not in line]
    number = data.draw(st.integers(0, len(lines) - 1))
    how = data.draw(st.sampled_from(["lose", "repeat", "repeat later", "cut", "cut file"]))
    text = "".join(f"{line}\n" for line in lines)
    if how == "lose":
        changed = [*lines[:number], *lines[number + 1 :]]
    elif how == "repeat":
        changed = [*lines[:number], lines[number], *lines[number:]]
    elif how == "repeat later":
        changed = [*lines, lines[number]]
    elif how == "cut":
        cut = data.draw(st.integers(0, len(lines[number]) - 2))
        changed = [*lines[:number], lines[number][:cut], *lines[number + 1 :]]
    else:
        changed = text[: data.draw(st.integers(0, len(text) - 3))].encode()
    reference, candidate = place("ref.log", lines), place("cand.log", changed)
    assert not accepts(verdict(reference, candidate)), how
    assert accepts(verdict(reference, place("same.log", lines)))


@given_cases
@given(formats, st.lists(st.sampled_from(list(positions(STEPS))), min_size=1, max_size=4, unique=True))
def test_nan_never_matches(place, name, where):
    spoilt = [json.dumps(entry(*p, main=float("nan") if p in where else None)) for p in positions(STEPS)]
    reference = place("ref.jsonl", spoilt)
    result = verdict(reference, place("cand.jsonl", spoilt))
    assert isinstance(result, Comparison) and result.main.matches == 8 - len(where) and result.exit_code == 1
    lines = FORMATS[name](STEPS)
    text = [re.sub(r"((?:final_loss|main_loss|val|loss)\W{1,4})\d\.\d+", r"\1nan", line) for line in lines]
    assert text != lines and not accepts(verdict(place("a.log", text), place("b.log", text)))


PIECES = ["0", "9", "00", "-", "f", "F", "nan", " ", "\n", "\r", "1e5", "12.5", "", "\x7f"]


def outcome(path: Path):
    """All that reading finds, as comparable values."""
    try:
        log, issues = read_log(path).resolve(microbatches=2)
    except UserError as error:
        return str(error)
    series = (log.main, log.mtp, log.grad_norms, log.main_tokens, log.mtp_tokens)
    columns = [(s.keys.tolist(), s.values.tobytes(), s.md5s.tobytes()) for s in series]
    return columns, list(issues), issues.count, log.header, log.notes


@given_cases
@given(formats, st.integers(1, 3), st.data())
def test_quick_and_careful_readers_agree(place, careful, name, ranks, data):
    """On logs that were cut, glued, shuffled and overwritten here and there."""
    lines = FORMATS[name](STEPS, 2, ranks)
    for _ in range(data.draw(st.integers(0, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        line = lines[number]
        at = data.draw(st.integers(0, max(0, len(line) - 1)))
        piece = data.draw(st.sampled_from(PIECES))
        lines[number] = line[:at] + piece + line[at + data.draw(st.integers(0, 2)) :]
    if data.draw(st.booleans()):
        lines = data.draw(st.permutations(lines))
    log = place("x.jsonl" if name == "json" else "x.log", lines)
    quick = outcome(log)
    careful()
    assert quick == outcome(log)


@given_cases
@given(st.sampled_from(["bundle.json", "tokens.npy", "init.safetensors", "losses.jsonl"]), st.data())
def test_spoilt_bundles(tmp_path_factory, name, data):
    """A byte changed, a piece lost or added: the bundle is read, or one sentence says why not."""
    bundle = make_bundle(tmp_path_factory.mktemp("b") / "b")
    raw = bytearray((bundle / name).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "lose", "add"]))
    if how == "change":
        raw[at] = data.draw(st.integers(0, 255))
    elif how == "cut":
        del raw[at:]
    elif how == "lose":
        del raw[at : at + data.draw(st.integers(1, 8))]
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    (bundle / name).write_bytes(bytes(raw))
    try:
        loaded = load_bundle(bundle)
        loaded.init()
        loaded.losses()
    except UserError as error:
        assert str(bundle) in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given_cases
@given(st.sampled_from(["format", "name", "source", "model", "training", "parallel"]), st.data())
def test_bundles_with_strange_values(tmp_path_factory, section, data):
    bundle = make_bundle(tmp_path_factory.mktemp("b") / "b")
    described = json.loads((bundle / "bundle.json").read_text())
    if isinstance(described[section], dict) and data.draw(st.booleans()):
        described[section][data.draw(st.sampled_from(sorted(described[section])))] = data.draw(VALUES)
    else:
        described[section] = data.draw(VALUES)
    (bundle / "bundle.json").write_text(json.dumps(described))
    try:
        load_bundle(bundle)
    except UserError as error:
        assert str(error)


@given_cases
@given(VALUES)
def test_strange_results_of_locate_and_bisect(tmp_path_factory, value):
    run = tmp_path_factory.mktemp("r")
    for name, read in (("ulps.json", read_distances), ("bisect.json", read_attributions)):
        for said in (value, [value], {"rows": value, "switches": value}):
            (run / name).write_text(json.dumps(said))
            try:
                read(run)
            except UserError as error:
                assert name in str(error)
