"""Options that several commands have, each with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Numerics = Annotated[
    str | None, typer.Option(help="Numerics preset; wins over the recipe, which wins over PADDLEDSV4_NUMERICS.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")]
Save = Annotated[str | None, typer.Option(help="Folder for checkpoints, instead of checkpoints in the run's folder.")]
SaveInterval = Annotated[
    int | None, typer.Option(min=1, help="Save every so many steps, and at the end; else only when a signal stops it.")
]
Resume = Annotated[
    str | None, typer.Option(help="A checkpoint, a folder of them (its latest), or auto: the run's own, if it has one.")
]
Metrics = Annotated[
    str | None, typer.Option(metavar="FORMATS", help="Write metrics.jsonl, and tensorboard or visualdl: their files.")
]
MetricsEvery = Annotated[int | None, typer.Option(min=1, help="Metrics after every so many steps; 10 by default.")]
ProfileSteps = Annotated[
    str | None, typer.Option(metavar="FIRST:LAST", help="Profile these steps, both included; see paddledsv4 profile.")
]
ProfileRanks = Annotated[str | None, typer.Option(metavar="RANKS", help="Ranks to profile, such as 0,3; 0 by default.")]
Force = Annotated[bool, typer.Option(help="Resume although configuration or numerics differ.")]
CheckFinite = Annotated[
    Literal["off", "loss", "full"] | None,
    typer.Option(help="Stop when a number is not finite: each loss, or in full each result of each operation."),
]
TraceAttention = Annotated[
    str | None, typer.Option(metavar="GLOB", help="Record the attention internals of layers, such as '*.layers.2.*'.")
]
TraceSteps = Annotated[str | None, typer.Option(metavar="STEPS", help="Steps to record, such as 1,5:8; 1 by default.")]
Out = Annotated[
    Path | None, typer.Option("--out", "--run-dir", help="The run's folder, which paddledsv4 resume goes on from.")
]
