"""The printed table, the README's copy of it, and what works without torch."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from reference import ROOT

from paddledsv4.cli import main
from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import load_all
from paddledsv4.numerics.rules import LayerRule
from paddledsv4.numerics.table import BEGIN, END, as_markdown, rows, update_file

OPS = load_all()


def run(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["numerics", *map(str, arguments)])
    captured = capsys.readouterr()
    return captured.out if ended.value.code == 0 else captured.err


def test_every_op_has_its_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = run(capsys, "--numerics", "megatron", "--op", "swiglu=plain", "--layer-op", "mtp.*:rope=plain")
    for row in rows(Policy.preset("megatron")):
        assert row.op in printed and row.variable in printed
    assert "→ plain" in printed and "mtp.*:rope=plain" in printed


def test_json(capsys):
    printed = json.loads(run(capsys, "--json", "--op", "sinkhorn=plain", "--layer-op", "mtp.*:rope=plain"))
    ops = {row["op"]: row for row in printed["ops"]}
    assert set(ops) == set(OPS) and printed["layers"] == ["mtp.*:rope=plain"]
    assert ops["sinkhorn"]["active"] == "plain" and ops["rope"]["active"] == "paddle"
    assert ops["sinkhorn"]["variable"] == "PADDLEDSV4_SINKHORN" and ops["sinkhorn"]["spec"] == "4.3"
    assert list(ops["sinkhorn"]["variants"]) == list(OPS["sinkhorn"].variants)


def test_every_op_has_shipped_ulps():
    assert {row.op for row in rows(Policy.preset()) if row.ulps} == set(OPS)


def test_the_readme_is_in_step():
    table = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()
    message = "README.md has an old table: paddledsv4 numerics --numerics paddle --write README.md (or make table)"
    assert table == as_markdown(Policy.preset("paddle")), message


def test_write(capsys, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert run(capsys, "--write", readme, "--numerics", "paddle") == ""
    assert readme.read_text() == f"before\n{BEGIN}\n{as_markdown(Policy.preset('paddle'))}\n{END}\nafter\n"
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize(
    "text", ["nothing", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}"]
)
def test_write_refuses_other_files(tmp_path, text):
    path = tmp_path / "other.md"
    path.write_text(text)
    with pytest.raises(UserError, match="once, in this order"):
        update_file(path, "table")
    assert path.read_text() == text
    with pytest.raises(UserError, match="cannot be read"):
        update_file(tmp_path / "none.md", "table")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--numerics", "fast"], "choose one of: paddle, plain, hf, megatron, torch"),
        (["--op", "sinkhorm=paddle"], "no op 'sinkhorm'"),
        (["--op", "sinkhorn"], "OP=VARIANT"),
        (["--layer-op", "sinkhorn=paddle"], "GLOB:OP=VARIANT"),
        (["--json", "--markdown"], "choose one of --json, --markdown and --write"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    error = run(capsys, *arguments)
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_help_has_examples(capsys):
    assert "paddledsv4 numerics --numerics torch" in run(capsys, "--help")


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "torch"},
        {"overrides": {"sinkhorn": "torch"}},
        {"layers": [LayerRule("mtp.*", "rope", "torch")]},
    ],
)
def test_torch_that_is_not_installed_is_said_when_the_policy_is_resolved(monkeypatch, choice):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs torch, which is not installed: pip install "paddledsv4\[torch\]"'):
        Policy.preset(**choice)
    assert Policy.preset("megatron").name == "megatron"


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("blocked")
sys.meta_path.insert(0, Blocker())
from {module} import main
sys.argv[1:] = {arguments!r}
main()
"""


def without_torch(module: str, *arguments: str) -> subprocess.CompletedProcess:
    code = BLOCKED.format(module=module, arguments=list(arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_without_torch_the_table_works_and_torch_is_one_error():
    assert without_torch("paddledsv4.cli", "numerics", "--numerics", "megatron").returncode == 0
    refused = without_torch("paddledsv4.cli", "numerics", "--numerics", "torch")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert 'pip install "paddledsv4[torch]"' in refused.stderr


def test_align_run_without_torch_reports_the_distance_of_every_kernel(tmp_path):
    """And the first steps stay within 5e-6 of the recording."""
    words = ["run", "tiny-fp32", "--numerics", "megatron", "--steps", "2", "--out", str(tmp_path / "out")]
    done = without_torch("align.cli", *words)
    assert done.returncode in (0, 1), done.stderr
    for op in OPS:
        assert any(op in line for line in done.stdout.splitlines() if line.startswith("note: ")), op
    found = [float(line.split("=")[1].split()[0]) for line in done.stdout.splitlines() if "_abs_diff=" in line]
    assert len(found) == 2 and max(found) < 5e-6
    refused = without_torch("align.cli", "run", "tiny-fp32", "--numerics", "torch", "--out", str(tmp_path / "no"))
    assert refused.returncode == 2 and 'pip install "paddledsv4[torch]"' in refused.stderr
    assert not (tmp_path / "no").exists()
