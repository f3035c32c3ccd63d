"""The table of numeric switches, for a terminal, for the README and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from paddledsv4.errors import UserError
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import Op, load_all
from paddledsv4.numerics.settings import SETTINGS, from_environment
from paddledsv4.numerics.ulps import both, measured

BEGIN, END = "<!-- numerics table: begin -->", "<!-- numerics table: end -->"


@dataclass(frozen=True)
class Row:
    """One op or setting: its switch, the notes of its variants, the active one, the measured distance of its kernels.

    ``same_bits``: variant -> why it gives the bits of ``megatron`` in float32 on a CPU.
    """

    op: str
    summary: str
    variable: str
    variants: dict[str, str]
    same_bits: dict[str, str]
    active: str
    spec: str
    ulps: dict[str, Any] | None

    @property
    def distance(self) -> str:
        """Mean units in the last place between ``megatron`` and ``torch``, forward / backward; "" if not measured."""
        return both(self.ulps, "mean") if self.ulps else ""


def rows(policy: Policy) -> list[Row]:
    """The ops of the table, sorted."""
    ulps = measured()["ops"]
    return [_row(op, policy.choices[op.name], ulps) for op in sorted(load_all().values(), key=lambda op: op.name)]


def setting_rows(chosen: Mapping[str, str]) -> list[Row]:
    """The settings behind the ops. ``chosen``: setting -> value, where it is not the default."""
    return [
        Row(s.name, s.summary, s.environment_variable, s.variants, {}, chosen.get(s.name, s.default), s.spec, None)
        for s in SETTINGS
    ]


def _row(op: Op, active: str, ulps: Mapping[str, Any]) -> Row:
    notes = {variant.name: variant.note for variant in op.variants.values()}
    same = {variant.name: variant.same_bits for variant in op.variants.values() if variant.same_bits}
    return Row(op.name, op.summary, op.environment_variable, notes, same, active, op.spec, ulps.get(op.name))


def as_table(policy: Policy) -> Table:
    """For a terminal; the active variant stands in bold and has an arrow."""
    title = f"numerics {policy.name} ({policy.fingerprint})"
    table = Table("op", "variable", "variants: what differs", "spec", title=title)
    table.add_column("ULPs", justify="right")
    for row in rows(policy) + setting_rows(from_environment()):
        lines = []
        for name, note in row.variants.items():
            same = row.same_bits.get(name)
            text = escape(f"{name}: {note}" + (f" (= megatron's bits: {same})" if same else ""))
            lines.append(f"[bold]→ {text}[/bold]" if name == row.active else f"  {text}")
        head = f"[bold]{row.op}[/bold]\n{escape(row.summary)}"
        table.add_row(head, row.variable, "\n".join(lines), row.spec, row.distance, end_section=True)
    return table


def as_markdown(policy: Policy) -> str:
    """For the README. Of the torch variant, only the name: it is ``megatron`` on torch's kernels throughout.

    Settings are shown at their defaults. An equals sign marks the variants that give the bits of ``megatron`` in
    float32 on a CPU.
    """
    lines = ["| op | variable | variants: what differs | spec | ULPs |", "|---|---|---|---|---|"]
    for row in rows(policy) + setting_rows({}):
        notes = [
            (f"**{name}**" if name == row.active else f"`{name}`")
            + ("=" if name in row.same_bits else "")
            + (f" {_cell(note)}" if name != "torch" else "")
            for name, note in row.variants.items()
        ]
        cells = [f"`{row.op}`", f"`{row.variable}`", "<br>".join(notes), row.spec, row.distance]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def as_dict(policy: Policy) -> dict[str, Any]:
    """For programs."""
    return {
        "preset": policy.name,
        "fingerprint": policy.fingerprint,
        "layers": [str(rule) for rule in policy.layers],
        "ulps_made_with": measured()["made_with"],
        "ops": [asdict(row) for row in rows(policy)],
        "settings": [asdict(row) for row in setting_rows(from_environment())],
    }


def update_file(path: Path, markdown: str) -> None:
    """Replace what stands between the two markers in ``path``.

    Raises:
        UserError: the file cannot be read, or has not each marker once, in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise UserError(f"{path}: must have the lines {BEGIN} and {END} once, in this order")
    whole = f"{before}{BEGIN}\n{markdown}\n{END}{after}"
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(whole, encoding="utf-8")
    temporary.replace(path)
