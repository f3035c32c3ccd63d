"""How many planted bugs `align locate` names, in float32 and in bfloat16, and whether clean runs stay silent.

The bugs are those of tests/single_card_tests/align/plants.py, in a model of three layers and one MTP layer, two steps.
Each line is written as soon as it is known.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / "single_card_tests" / folder) for folder in ("", "align"))]

import typer  # noqa: E402

from paddledsv4.host import prepare_host  # noqa: E402

CLEAN = ("paddle", "plain", "megatron", "torch")
EXAMPLES = "Example:  python benchmarks/locate.py --precision fp32 | tee docs/locate-fp32.md"


def main(
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    clean: Annotated[bool, typer.Option(help="Also run every preset without a bug.")] = True,
) -> None:
    """Write a markdown table of planted bugs and what was found."""
    prepare_host(bitwise=True)
    from locating import reference, search
    from plants import BUGS

    from align.locate.show import verdict

    print(f"## {precision}\n")
    if clean:
        alarms = {preset: search(precision, preset).first for preset in CLEAN}
        said = ", ".join(f"`{p}` {'silent' if a is None else 'ALARM ' + a.where}" for p, a in alarms.items())
        print(f"Clean runs: {said}.\n", flush=True)
    print("| bug | candidate | expected | named | |\n|---|---|---|---|---|")
    bugs = [bug for bug in BUGS if precision in bug.precisions]
    hits = 0
    for bug in bugs:
        reference(precision, bug.preset)  # recorded before the bug is there
        with bug.plant():
            found = search(precision, bug.preset)
        hit = found.first is not None and found.first.op == bug.op
        hits += hit
        said = verdict(found).removeprefix("first fault: ").replace("|", "\\|")
        print(f"| {bug.name} | {bug.preset} | `{bug.op}` | {'yes' if hit else '**no**'} | {said} |", flush=True)
    print(f"\n{hits} of {len(bugs)} named.")


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, rich_markup_mode="rich")
    command.command(epilog=EXAMPLES)(main)
    command()
