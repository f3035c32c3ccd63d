"""The report: structure, escaping, NaN, no outside help; and a look through a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import entry, make_bundle, positions, write
from typer.testing import CliRunner

from align.cli import app
from align.report.curves import POINTS, curve
from align.report.strip import short

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
NASTY = "<script>alert('x')</script>&\"'"


def align(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", steps=6)


def make_run(path, reference, changes=None, **header):
    """A run whose losses are the bundle's but for ``changes``: position -> main loss."""
    path.mkdir()
    said = {
        "bundle": "tiny-fp32", "bundle_path": str(reference), "steps": 6, "precision": "fp32", "numerics": "paddle",
        "policy_fingerprint": "abc", "policy": {"sinkhorn": "paddle", "rope": "plain"}, "paddle": "3.3.1",
        "environment": {"OMP_NUM_THREADS": "4", "MKL_CBWR": None},
    }  # fmt: skip
    lines = [json.dumps({"run": said | header})]
    lines += [json.dumps(entry(*p, main=(changes or {}).get(p))) for p in positions(6)]
    write(path / "losses.jsonl", lines)
    return path


class Page(HTMLParser):
    """Counts tags, collects text and checks that tags are closed in order."""

    VOID = {"meta", "br", "path"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(run, *more):
    result = align("report", run, *more)
    assert result.exit_code == 0, result.output
    return (run / "report.html").read_text(encoding="utf-8")


def test_an_equal_run(tmp_path, bundle):
    html = page_of(make_run(tmp_path / "run", bundle))
    page = Page(html)
    assert "Every loss is equal" in page.text and "main_matches=12/12" in page.text and "≠ " not in page.text
    assert page.tags.count("figure") == 2 and "script" not in page.tags and not page.links
    assert html.index("main_matches=") < html.index("<svg")
    assert 'class="mark" d=""' in html and 'class="bar" d=""' in html
    assert "align run" in page.text and "export OMP_NUM_THREADS=4" in page.text and "MKL_CBWR=" not in page.text


def test_a_different_run_is_marked(tmp_path, bundle):
    html = page_of(make_run(tmp_path / "run", bundle, {(3, 1, 0): 2.5}))
    page = Page(html)
    assert "The losses differ" in page.text and "main_matches=11/12" in page.text
    assert "step 3, microbatch 1, rank 0" in page.text and "1 of 6" in " ".join(page.text.split())
    marks = [re.findall("M", d) for d in re.findall(r'class="mark" d="([^"]*)"', html)]
    assert [len(found) for found in marks] == [1, 1, 0]  # the legend's, main's, MTP's


def test_nan_leaves_a_gap_and_never_matches(tmp_path, bundle):
    html = page_of(make_run(tmp_path / "run", bundle, {(2, 0, 0): float("nan"), (4, 0, 0): float("inf")}))
    assert "main_matches=10/12" in html and "(nan ULP)" in html
    paths = re.findall(r' d="([^"]*)"', html)
    assert not any("nan" in path or "inf" in path for path in paths)
    assert max(path.count("M") for path in re.findall(r'class="candidate" d="([^"]*)"', html)) == 3
    assert re.search(r'class="nan" d="M', html)


def test_nothing_from_the_run_becomes_markup(tmp_path, bundle):
    run = make_run(
        tmp_path / "run", bundle, {(1, 0, 0): 1.0}, numerics=NASTY, policy={NASTY: NASTY}, environment={NASTY: NASTY},
        paddle=NASTY, policy_fingerprint=NASTY,
    )  # fmt: skip
    (run / "ulps.json").write_text(json.dumps([{"layer": NASTY, "op": NASTY, "max_ulp": 3, "equal": False}]))
    write(run / "losses.jsonl", [*(run / "losses.jsonl").read_text().splitlines(), NASTY])
    html = page_of(run)
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html and page.text.count(NASTY) >= 5


def test_no_outside_addresses(tmp_path, bundle):
    html = page_of(make_run(tmp_path / "run", bundle))
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", html)


def test_strip_and_attribution(tmp_path, bundle):
    run = make_run(tmp_path / "run", bundle)
    assert 'id="ulps"' not in page_of(run) and "max loss difference" not in page_of(run)
    rows = [
        {"layer": "decoder.layers.0", "op": "rope", "direction": "forward", "max_ulp": 0, "equal": True},
        {"layer": "decoder.layers.1", "op": "rope", "direction": "forward", "max_ulp": 70, "equal": False},
        {"layer": "decoder.layers.1", "op": "rope", "direction": "forward", "max_ulp": 7e5, "equal": False},
        {"layer": "mtp.layers.0", "op": "rope", "direction": "backward", "max_ulp": float("nan"), "equal": False},
    ]
    (run / "locate.json").write_text(json.dumps({"rows": rows, "other": 1}))
    (run / "bisect.json").write_text(json.dumps([{"op": "sinkhorn", "first_differing_step": 3,
                                                  "max_loss_difference": 1e-3, "seconds_per_step": 0.25}]))  # fmt: skip
    html = page_of(run)
    assert html.count('class="strip"') == 2
    assert re.findall(r'<td class="u(\w+)"[^>]*>([^<]*)<', html) == [("0", "="), ("5", "700k"), ("nan", "NaN")]
    assert html.index(">sinkhorn<") < html.index(">rope</th><td>plain")  # what matters comes first
    text = align("report", run, "--format", "text").stdout
    assert text.startswith("EQUAL: ") and "first differing step 3, max loss difference 0.001, 0.25 s/step" in text
    assert "700k" in text


def test_json_is_strict(tmp_path, bundle):
    run = make_run(tmp_path / "run", bundle, {(2, 0, 0): float("nan")})
    (run / "ulps.json").write_text('[{"layer": "a", "op": "b", "max_ulp": NaN, "equal": false}]')
    result = align("report", run, "--format", "json", "--out", tmp_path / "r.json")

    def refuse(constant):
        raise AssertionError(constant)

    said = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert result.exit_code == 0 and result.stdout == ""
    assert said["verdict"] == "DIFFERENT" and said["main"]["matches"] == 11 and said["main"]["max_ulp"] == "nan"
    assert said["curves"][0]["differs"] == [False, True, False, False, False, False]
    assert said["ulps"][0]["max_ulp"] == "nan" and len(said["switches"]) == 2


@pytest.mark.parametrize("name", ["ulps.json", "bisect.json"])
@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"op": 3}]', "[" * 100_000, '{"rows": 1, "switches": 2}'])
def test_malformed_results_are_told(tmp_path, bundle, name, text):
    run = make_run(tmp_path / "run", bundle)
    (run / name).write_text(text)
    result = align("report", run)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and name in result.stderr
    assert not (run / "report.html").exists()


def test_the_bundle_is_found_or_asked_for(tmp_path, bundle):
    run = make_run(tmp_path / "run", bundle, bundle_path="/nowhere", bundle="nothing")
    result = align("report", run)
    assert result.exit_code == 2 and "--bundle" in result.stderr
    assert align("report", run, "--bundle", bundle).exit_code == 0
    assert align("report", tmp_path).exit_code == 2 and align("report", tmp_path / "no").exit_code == 2


def test_long_runs_are_averaged():
    from align.losslog import LossSeries

    steps = np.arange(1, 12_346)
    series = LossSeries(steps << 32, 1.0 / steps, np.zeros((len(steps), 2), np.uint64))
    other = LossSeries(series.keys, series.values.copy(), series.md5s)
    other.values[7000] *= 1.001
    found = curve("main", series, other)
    assert len(found.first) <= POINTS and found.last[-1] == 12_345 and found.differing == 1


def test_short_names():
    assert [short(n) for n in ("decoder.layers.3", "mtp.layers.0.mtp_model_layer", "embedding")] == [
        "3", "mtp 0", "embedding"]  # fmt: skip


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(tmp_path, bundle, width):
    """Nothing is wider than the window, and the page draws something."""
    run = make_run(tmp_path / "run", bundle, {(3, 1, 0): 2.5})
    rows = [{"layer": f"decoder.layers.{i}", "op": "sparse_attention", "max_ulp": 9, "equal": False} for i in range(60)]
    (run / "ulps.json").write_text(json.dumps(rows))
    page_of(run)
    probe = run / "probe.html"  # the report in a frame of the width: a window may have a least width of its own
    probe.write_text(
        f'<body style="margin:0"><iframe src="report.html" width="{width}" height="900" id="f"></iframe><script>'
        "f.onload = () => { const e = f.contentDocument.documentElement;"
        "const drawn = f.contentDocument.querySelectorAll('svg').length;"
        "document.title = e.scrollWidth + ' ' + e.clientWidth + ' ' + drawn }"
        "</script>"
    )
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=3000", f"--window-size={width + 50},1000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout + done.stderr
    assert int(found[1]) <= int(found[2]) <= width and int(found[3]) == 7
