"""A report as a page, as text and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from textwrap import wrap
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.compare import SeriesComparison
from align.report import plot
from align.report.data import Report
from align.report.inputs import Attribution
from align.report.strip import BOUNDS, short, strips


def as_html(report: Report) -> str:
    """One self-contained page: no script, no font and no picture from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "figure": figure}
    return environment.get_template("page.html.j2").render(
        report=report,
        comparison=report.comparison,
        sides=_sides(report),
        charts=[plot.chart(curve) for curve in report.curves],
        plot=plot,
        strips=strips(report.distances),
        bounds=BOUNDS,
        switches=switches(report),
    )


def as_text(report: Report) -> str:
    """The same for a terminal: verdict first."""
    comparison, bundle = report.comparison, report.bundle
    lines = [f"{verdict(report)}: {report.run} against {bundle.name} ({bundle.path})", "", comparison.render()]
    for curve in report.curves:
        places = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(curve.first, curve.last, strict=True)]
        marked = [place for place, differs in zip(places, curve.differs, strict=True) if differs]
        more = f" and {len(marked) - 20} more" if len(marked) > 20 else ""
        lines += ["", f"{curve.kind} loss differs at {len(marked)} of {len(places)} steps" + (":" if marked else "")]
        lines += ["  " + " ".join(marked[:20]) + more] if marked else []
    for strip in strips(report.distances):
        width = max(len(op) for op, _ in strip.rows)
        lines += ["", f"{strip.direction}: largest distance in ULP, op by layer (= is equal)"]
        lines.append(" " * (width + 2) + " ".join(f"{short(layer):>5}" for layer in strip.layers))
        for op, cells in strip.rows:
            lines.append(f"  {op:<{width}}" + " ".join(f"{cell.text if cell else '':>5}" for cell in cells))
    lines += ["", f"numerics {report.header.get('numerics')}, policy {report.header.get('policy_fingerprint')}"]
    rest: dict[str, list[str]] = {}
    for row in switches(report):
        if row["attribution"]:
            lines.append(f"  {row['op']:<24} {row['variant']:<10} {_told(row['attribution'])}".rstrip())
        else:
            rest.setdefault(row["variant"], []).append(row["op"])
    for variant, ops in rest.items():
        lines += wrap(f"{variant}: {', '.join(ops)}", 110, initial_indent="  ", subsequent_indent="    ")
    lines += ["", "environment (run / reference)"]
    for setting in report.settings:
        reference = "" if setting.reference is None else f" / {setting.reference}"
        lines.append(f"  {setting.name:<24} {setting.here}{reference}" + ("  DIFFERS" if setting.differs else ""))
    return "\n".join([*lines, "", "reproduce", *(f"  {command}" for command in report.commands)]) + "\n"


def as_json(report: Report) -> str:
    """The same for programs; what is no finite number is the text nan, inf or -inf."""
    comparison = report.comparison
    said: dict[str, Any] = {
        "verdict": verdict(report),
        "run": str(report.run),
        "bundle": {"name": report.bundle.name, "path": str(report.bundle.path), "source": report.bundle.source},
        "issues": {"count": comparison.issues.count, "first": list(comparison.issues)},
        "notes": comparison.notes,
    }
    for kind, side in _sides(report):
        said[kind] = {
            "matches": side.matches,
            "expected": side.expected,
            "first_diff": side.first_diff and list(side.first_diff),
            "max_abs_diff": side.max_abs_diff,
            "max_ulp": side.max_ulp,
            "missing": side.missing,
            "extra": side.extra,
        }
    said["curves"] = [
        {name: value if isinstance(value, str) else value.tolist() for name, value in vars(curve).items()}
        for curve in report.curves
    ]
    said["ulps"] = [row.model_dump() for row in report.distances]
    said["switches"] = [
        {"op": row["op"], "variant": row["variant"]}
        | (row["attribution"].model_dump(exclude={"op"}) if row["attribution"] else {})
        for row in switches(report)
    ]
    said["environment"] = {s.name: {"run": s.here, "reference": s.reference} for s in report.settings}
    said["header"], said["reproduce"] = report.header, report.commands
    return json.dumps(_finite(said), indent=1, allow_nan=False) + "\n"


def verdict(report: Report) -> str:
    """EQUAL or DIFFERENT."""
    return "EQUAL" if report.comparison.ok else "DIFFERENT"


def switches(report: Report) -> list[dict[str, Any]]:
    """Every op with its variant and, where ``align bisect`` told, what it costs; those that matter first."""
    names = sorted({*report.policy, *report.attributions})
    rows = [
        {"op": op, "variant": report.policy.get(op, ""), "attribution": report.attributions.get(op)} for op in names
    ]
    return sorted(rows, key=lambda row: -_weight(row["attribution"]))


def figure(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


def _told(known: Attribution) -> str:
    difference, seconds = figure(known.max_loss_difference), figure(known.seconds_per_step)
    first = "none" if known.first_differing_step is None else known.first_differing_step
    return f"first differing step {first}, max loss difference {difference}, {seconds} s/step"


def _weight(known: Attribution | None) -> float:
    largest = known.max_loss_difference if known else None
    return -1.0 if largest is None else math.inf if math.isnan(largest) else largest


def _sides(report: Report) -> list[tuple[str, SeriesComparison]]:
    return [("main", report.comparison.main), ("mtp", report.comparison.mtp)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value
