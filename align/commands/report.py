"""``align report``: one page about a run."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from align.commands.people import for_people


class Format(str, Enum):
    """What a report is written as."""

    html = "html"
    text = "text"
    json = "json"


EXAMPLES = (
    "Examples:  [bold]align report runs/tiny-fp32-torch-fp32[/]   "
    "[bold]align report runs/tiny-fp32-paddle-fp32 --format text[/]   "
    "[bold]align report runs/mine --format json --out report.json[/]"
)


def report(
    run: Annotated[Path, typer.Argument(help="The directory that align run wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The file; RUN/report.html for html, standard output for text and json.")
    ] = None,
    format: Annotated[Format, typer.Option(help="One self-contained page, text, or JSON.")] = Format.html,
    bundle: Annotated[
        str | None, typer.Option(help="The reference bundle, where the run's log does not say it, or it was moved.")
    ] = None,
) -> None:
    """Put on one page what a run says: verdict, loss curves, numerics, environment, how to repeat it.

    Of RUN it reads losses.jsonl and, where they are there, ulps.json or locate.json (distances by layer and op) and
    bisect.json (what each switch does).

    Exit code 0: the report is written, whatever it says. 2: bad input.
    """
    with for_people():
        from align.files import write_whole
        from align.report.data import gather
        from align.report.render import as_html, as_json, as_text

        found = gather(run, bundle)
        said = {Format.html: as_html, Format.text: as_text, Format.json: as_json}[format](found)
        if out is None and format != Format.html:
            print(said, end="")
            return
        path = out or run / "report.html"
        write_whole(path, said)
        print(f"report: {path}", file=sys.stderr)
