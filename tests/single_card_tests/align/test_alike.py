"""The quick reader: numbers exactly as float() reads them, and refusal of whatever is not alike."""

import re
from decimal import Decimal

import numpy as np
import pytest
from synthetic import json_lines, read, write

from align.alike import INTEGER, MD5, VALUE, Shape, Unlike, tables

PATTERN = re.compile(rb"at (\d+) is (\S+) md5 ([0-9a-f]{32})")
HEX = "0123456789abcdef" * 2


def learn(line):
    found = PATTERN.fullmatch(line)
    return Shape(line, found, (INTEGER, VALUE, MD5), None) if found else None


def read_all(texts):
    block = "".join(f"at {i} is {text} md5 {HEX}\n" for i, text in enumerate(texts)).encode()
    values = np.full(len(texts), -1.0)
    for table in tables(block, learn):
        assert (table.integers(1) == table.at).all()
        values[table.at] = table.values(2)
        assert table.md5s(3).tobytes() == bytes.fromhex(HEX) * len(table)
    return values


def halfway(value):
    """Just between two float64, and a little to either side of it."""
    middle = Decimal(value) + Decimal(float(np.spacing(value))) / 2
    return [f"{middle + step * Decimal(10) ** -22:.22f}" for step in (-1, 0, 1)]


@pytest.mark.parametrize("decimals", [1, 7, 15, 16, 20, 22])
def test_every_value_is_that_of_float(decimals):
    values = np.random.default_rng(decimals).uniform(0, 30, 1500)
    texts = [f"{v:.{decimals}f}" for v in (*values, *values.astype(np.float32).tolist(), *-values, 0.0, -0.0)]
    assert np.array_equal(read_all(texts).view(np.uint64), np.array([float(t) for t in texts]).view(np.uint64))


def test_values_between_two_floats():
    values = [*np.random.default_rng(0).uniform(1, 9, 300), 1.0, 2.0, 4.0]
    texts = [text for value in values for text in halfway(float(value))]
    texts += [f"{Decimal(v) - Decimal(float(np.spacing(v))) / 4:.22f}" for v in (1.0, 2.0, 4.0, 8.0)]
    assert np.array_equal(read_all(texts), [float(t) for t in texts])


def test_constant_texts():
    values = read_all(["nan", "inf", "1.5", "nan", "1e3"])
    assert np.array_equal(values, [np.nan, np.inf, 1.5, np.nan, 1e3], equal_nan=True)


@pytest.mark.parametrize(
    "line",
    [
        f"at 1 is 2.0 md5 {HEX.upper()}", f"at 1 is 2.0 md5 {HEX[:-1]}:", f"at 1 is 2.0 md5 {HEX[:-1]}Z", "other",
        f"at 01 is 2.0 md5 {HEX}", f"at 1 is 2.0.0 md5 {HEX}", f"at 1 is 2.{'0' * 40} md5 {HEX}",
        f"at 1 is abc md5 {HEX}", f"at {'1' * 20} is 2.0 md5 {HEX}", f"at 1 is 2,0 md5 {HEX}",
    ],
)  # fmt: skip
def test_what_is_unlike_is_refused(line):
    block = f"at 0 is 2.0 md5 {HEX}\n{line}\n".encode()
    with pytest.raises(Unlike):
        for table in tables(block, learn):
            table.integers(1), table.values(2), table.md5s(3)


def test_refused_lines_are_told_by_the_careful_reader(tmp_path):
    lines = json_lines(3)
    md5 = re.search("[0-9a-f]{32}", lines[2])[0]
    lines[2] = lines[2].replace(md5, md5.upper())
    _, issues = read(write(tmp_path / "log.jsonl", lines))
    assert len(issues) == 1 and "32 hexadecimal digits" in issues[0]
