"""``paddledsv4 plot``: the metrics of a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paddledsv4.errors import UserError

EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 train --config configs/tiny.yaml --metrics jsonl

  paddledsv4 plot runs/tiny

  paddledsv4 plot runs/tiny/metrics.jsonl --out page.png"""


def plot(
    file: Annotated[Path, typer.Argument(help="A metrics.jsonl, or the folder of a run that has one.")],
    out: Annotated[Path | None, typer.Option(help="The picture; beside the file by default.")] = None,
) -> None:
    """Draw the metrics of a run as one page of curves (PNG), while it goes on as well."""
    from paddledsv4.observe.metrics.log import FILE, read_metrics
    from paddledsv4.observe.metrics.plot import draw_metrics

    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; paddledsv4 train --metrics jsonl writes one")
    records = read_metrics(file)
    if not records:
        raise UserError(f"{file}: has no line of metrics")
    picture = out or file.with_suffix(".png")
    try:
        draw_metrics(records, picture)
    except OSError as error:
        raise UserError(f"{picture}: cannot be written ({error.strerror})") from None
    print(picture)
