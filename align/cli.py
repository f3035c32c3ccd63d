"""The command line of align. ``run`` and ``compare`` are here, the other commands in align/commands."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from align.commands import bisect, capture, doctor, locate, merge, report, repro, ulps
from align.commands.people import for_people
from align.compare import Comparison, compare_logs
from align.issues import Issues
from align.rawlog import AUTO, MAIN_FIRST, MAIN_ONLY, MTP_FIRST
from align.readlog import read_pair
from paddledsv4.errors import UserError
from paddledsv4.host import return_freed_memory
from paddledsv4.numerics.options import LayerOps, Ops
from paddledsv4.numerics.rules import Overrides

app = typer.Typer(
    help="Prove that two trainers compute the same losses, bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


TENSORS = ".safetensors"


class Precision(str, Enum):
    """Precisions that ``align run`` can train in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Order(str, Enum):
    """In which order a text log prints the ``final_loss:`` lines of a microbatch."""

    auto = AUTO
    main_first = MAIN_FIRST
    mtp_first = MTP_FIRST
    main_only = MAIN_ONLY


@app.command(
    epilog="Examples:  [bold]align run tiny-fp32 --numerics torch[/]   "
    "[bold]align run ./my-bundle --precision fp64 --steps 5[/]   "
    "[bold]align run tiny-fp32 --numerics torch --op sinkhorn=paddle[/]   "
    "[bold]align run ./ep2-fp32 --numerics torch --launch[/]"
)
def run(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    numerics: Annotated[
        str | None,
        typer.Option(
            help="Numerics preset, such as paddle or torch; PADDLEDSV4_NUMERICS, or paddle, by default."
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="The bundle's own by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Run and expect only the first N steps.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for losses.jsonl; runs/BUNDLE-NUMERICS-PRECISION by default."),
    ] = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    launch: Annotated[
        bool, typer.Option("--launch", help="Start the bundle's ranks as processes; their logs go to DIR/ranks.")
    ] = False,
) -> None:
    """Train a bundle's model with paddledsv4 and compare every loss with the recorded one.

    Writes DIR/losses.jsonl when training is done, and prints the comparison last.

    A bundle of many ranks needs --launch, or the same command without it behind
    [bold]python -m paddle.distributed.launch --nproc_per_node N python -m[/].

    Exit code 0: every main and MTP loss is bit-identical. 1: some differ. 2: bad input.
    """
    with for_people():
        from align.run import RunRequest, run_bundle

        overrides = Overrides.from_texts(op, layer_op)
        precision_name = precision.value if precision else None
        request = RunRequest(bundle, numerics, precision_name, steps, out, overrides, launch)
        comparison, path = run_bundle(request)
    if comparison is not None:  # rank 0 speaks for all
        print(f"losses: {path}", file=sys.stderr)
        _finish(comparison)


@app.command(
    epilog="Examples:  [bold]align compare tiny-fp32 runs/tiny-fp32-torch-fp32[/]   "
    "[bold]align compare megatron.log paddle.log --microbatches 2[/]"
)
def compare(
    ref: Annotated[
        str,
        typer.Argument(
            help="The reference: a log, a directory with losses.jsonl, or a shipped bundle's name."
        ),
    ],
    cand: Annotated[str, typer.Argument(help="The candidate: a log, or a directory with losses.jsonl.")],
    microbatches: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            help="Microbatches per step and rank, for logs that only count; the other log's by default.",
        ),
    ] = None,
    ref_order: Annotated[Order, typer.Option(help="Order of the reference's final_loss lines.")] = Order.auto,
    cand_order: Annotated[
        Order, typer.Option(help="Order of the candidate's final_loss lines.")
    ] = Order.auto,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Expect exactly steps 1 to N; all of the bundle's or the reference's by default.",
        ),
    ] = None,
) -> None:
    """Compare two logs loss by loss: JSON lines or the text that trainers print.

    Or two files of tensors (.safetensors), such as traces of attention, name by name.

    Exit code 0: every loss of the reference is bit-identical in the candidate, and neither log has a missing,
    duplicate or truncated line. 1: not so. 2: bad input.
    """
    with for_people():
        if ref.endswith(TENSORS) or cand.endswith(TENSORS):
            from align.tensor_files import compare_tensor_files

            comparison = compare_tensor_files(Path(ref), Path(cand))
            print(comparison.render())
            raise typer.Exit(comparison.exit_code)
        return_freed_memory()
        reference, candidate = _log_path(ref), _log_path(cand)
        (one, found), (other, more) = read_pair(
            reference, candidate, microbatches, ref_order.value, cand_order.value
        )
        issues = Issues("")
        issues.extend(found)
        issues.extend(more)
        comparison = compare_logs(one, other, steps or _promised_steps(reference), issues)
    _finish(comparison)


for module, command in (
    (bisect, bisect.bisect), (capture, capture.capture), (doctor, doctor.doctor), (locate, locate.locate),
    (merge, merge.merge), (report, report.report), (repro, repro.repro), (ulps, ulps.ulps),
):
    app.command(epilog=module.EXAMPLES)(command)


@app.callback()
def _root() -> None:
    """Prove that two trainers compute the same losses, bit for bit."""


def _finish(comparison: Comparison) -> None:
    print(comparison.render())
    raise typer.Exit(comparison.exit_code)


def _log_path(given: str) -> Path:
    """The log that an argument means."""
    path = Path(given)
    if not path.exists():
        from align.bundle import SHIPPED, shipped_bundles

        if given in shipped_bundles():
            path = SHIPPED / given
    if not path.is_dir():
        return path
    if not (path / "losses.jsonl").is_file():
        raise UserError(f"{path} has no losses.jsonl: it is neither a bundle nor the result of align run")
    return path / "losses.jsonl"


def _promised_steps(log: Path) -> int | None:
    """The steps that the bundle.json beside a reference log promises; None where there is none."""
    path = log.with_name("bundle.json")
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["training"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} does not say training.steps; fetch the bundle again, or give --steps"
        ) from None


def main() -> None:
    """Entry point of the ``align`` command."""
    try:
        app(prog_name="align")
    except KeyboardInterrupt:
        sys.exit(130)
