"""The command line options that choose numerics, shared by every command that has them."""

from __future__ import annotations

from typing import Annotated

import typer

Ops = Annotated[
    list[str] | None,
    typer.Option("--op", metavar="OP=VARIANT", help="One op's variant, such as swiglu=paddle. Repeatable."),
]
LayerOps = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-op",
        metavar="GLOB:OP=VARIANT",
        help='The variant of an op in some layers, such as "decoder.layers.2.*:swiglu=paddle". Repeatable; wins over '
        "--op, and a later rule over an earlier one.",
    ),
]
