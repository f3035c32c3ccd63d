"""``align capture``: our own run of a bundle, recorded as a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from align.commands.people import for_people
from paddledsv4.numerics.options import LayerOps, Ops
from paddledsv4.numerics.rules import Overrides

EXAMPLES = (
    "Examples:  [bold]align capture tiny-fp32 --numerics torch --out runs/traced[/]   "
    "[bold]align capture ./mine --steps 1,3 --microbatches 0,1 --names 'decoder.layers.0.*' --out runs/mine[/]   "
    "[bold]align capture tiny-fp32 --what choices,optimizer --out runs/choices[/]"
)


def capture(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; must not be there yet.")],
    numerics: Annotated[
        str | None, typer.Option(help="Numerics preset; PADDLEDSV4_NUMERICS, or paddle, by default.")
    ] = None,
    steps: Annotated[str, typer.Option(help="Steps to trace, from 1: 1,2 or 1-3. Training ends after the last.")] = "1",
    microbatches: Annotated[str, typer.Option(help="Microbatches of these steps to trace, from 0.")] = "0",
    ranks: Annotated[str, typer.Option(help="Ranks to trace; there is one so far.")] = "0",
    names: Annotated[
        list[str] | None,
        typer.Option(help="Glob of trace and parameter names, * runs over dots; may be given often. All by default."),
    ] = None,
    what: Annotated[
        str, typer.Option(help="Kinds of tensors, with commas.")
    ] = "forward,gradients,param_grads,optimizer,choices",
    op: Ops = None,
    layer_op: LayerOps = None,
) -> None:
    """Train a bundle's model with paddledsv4 and record what passes through it, as a bundle of its own.

    The losses are those of align run, bit for bit. The format of the trace folder stands in align/capture/__init__.py.

    Exit code 0: the bundle is written. 2: bad input, and nothing is written.
    """
    with for_people():
        from align.capture.run import CaptureRequest, capture_bundle
        from align.capture.selection import Selection, numbers

        selection = Selection(
            numbers(steps, "--steps"), numbers(microbatches, "--microbatches"), tuple(names or ["*"]),
            tuple(kind.strip() for kind in what.split(",")),
        )  # fmt: skip
        overrides = Overrides.from_texts(op, layer_op)
        request = CaptureRequest(bundle, out, selection, numbers(ranks, "--ranks"), numerics, overrides)
        print(capture_bundle(request), file=sys.stderr)
