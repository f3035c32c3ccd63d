"""The ``paddledsv4`` command: train from a recipe, size a model, list the numeric choices."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from paddledsv4.commands import convert, options, plot, profile, sft
from paddledsv4.commands import resume as resuming
from paddledsv4.commands.observing import observed
from paddledsv4.commands.output import name_rank
from paddledsv4.commands.pretraining import pretrain
from paddledsv4.commands.running import choose_checkpoints, choose_policy, choose_training, prepare_paddle
from paddledsv4.config import ModelConfig, Recipe
from paddledsv4.distributed.launch import Launch
from paddledsv4.errors import UserError
from paddledsv4.info import ACTIVATION_FORMULA, BFLOAT16, FLOAT32, ModelInfo, model_info
from paddledsv4.numerics.options import LayerOps, Ops
from paddledsv4.numerics.rules import Overrides

# Paddle is imported inside the commands that compute: `info` and every --help answer without it.

app = typer.Typer(
    help="DeepSeek-V4 training on PaddlePaddle that computes what Megatron-LM computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

TRAIN_EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 train --config configs/tiny.yaml

  paddledsv4 train --config configs/tiny.yaml --steps 20 --out runs/short --numerics plain

  paddledsv4 train --config configs/tiny.yaml --save-interval 10 --save-retain-interval 50"""

NUMERICS_EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 numerics

  paddledsv4 numerics --numerics torch --op sinkhorn=paddle

  paddledsv4 numerics --layer-op "decoder.layers.2.*:swiglu=plain" --json | jq .fingerprint

  paddledsv4 numerics --write README.md"""

INFO_EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 info --config configs/flash.yaml

  paddledsv4 info --config DeepSeek-V4-Pro/config.json --json | jq .parameters"""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    config: Annotated[Path, typer.Option(help="A yaml recipe with model, training and data sections.")],
    steps: options.Steps = None,
    out: options.Out = None,
    numerics: options.Numerics = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    save: options.Save = None,
    save_interval: options.SaveInterval = None,
    save_retain_interval: Annotated[
        int | None, typer.Option(min=1, help="Delete older checkpoints unless their step is a multiple of this.")
    ] = None,
    warmup_save: Annotated[bool | None, typer.Option(help="Also save after the first step.")] = None,
    async_save: Annotated[bool | None, typer.Option(help="Write while training goes on.")] = None,
    resume: options.Resume = None,
    force: options.Force = False,
    check_finite: options.CheckFinite = None,
    trace_attention: options.TraceAttention = None,
    trace_steps: options.TraceSteps = None,
    metrics: options.Metrics = None,
    metrics_every: options.MetricsEvery = None,
    profile_steps: options.ProfileSteps = None,
    profile_ranks: options.ProfileRanks = None,
) -> None:
    """Train a model and leave a folder with its log (train.jsonl) and loss curves (loss.png), and all it was made of.

    SIGTERM and Ctrl-C finish the step and save; [bold]paddledsv4 resume[/] goes on. A second one stops at once.

    A recipe whose parallel section has N ranks is started behind
    [bold]python -m paddle.distributed.launch --nproc_per_node N python -m paddledsv4[/]. One with a lora section also
    leaves its adapters, in the folder adapter beside the log.
    """
    recipe, given = Recipe.from_file(config), Overrides.from_texts(op, layer_op)
    try:
        training, _ = recipe.require("training"), recipe.require("data")
    except UserError as error:
        raise UserError(f"{config}: {error}") from None
    training = choose_training(training, steps)
    saving = choose_checkpoints(
        recipe, dir=save, save_interval=save_interval, save_retain_interval=save_retain_interval,
        warmup_save=warmup_save, asynchronous=async_save,
    )
    changes = {"training": training, "checkpoint": saving, "output": str(out or recipe.output)}
    recipe = observed(
        recipe.model_copy(update=changes), check_finite, trace_attention, trace_steps,
        metrics, metrics_every, profile_steps, profile_ranks,
    )  # fmt: skip
    pretrain(recipe, lambda: choose_policy(recipe, numerics, given), resume, force)


app.command(epilog=sft.EXAMPLES)(sft.sft)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=plot.EXAMPLES)(plot.plot)
app.command(epilog=profile.EXAMPLES)(profile.profile)
app.command(epilog=resuming.EXAMPLES)(resuming.resume)


@app.command(epilog=INFO_EXAMPLES)
def info(
    config: Annotated[
        Path, typer.Option(help="A config.json, a recipe, a bundle.json, or a folder with one.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print plain numbers as JSON.")] = False,
) -> None:
    """Count parameters and estimate training memory, part by part, without allocating anything."""
    numbers = model_info(ModelConfig.from_file(config))
    if as_json:
        print(json.dumps(numbers.to_dict(), indent=2))
        return
    console = Console()
    console.print(_parts_table(numbers))
    console.print(_memory_table(numbers))
    console.print(f"[dim]Activations: {ACTIVATION_FORMULA}[/dim]", highlight=False)


def _parts_table(numbers: ModelInfo) -> Table:
    table = Table("part", title="Parameters")
    for heading in ("parameters", "share", "used per token"):
        table.add_column(heading, justify="right")
    for part in numbers.parts:
        share = f"{part.parameters / numbers.parameters:.2%}"
        table.add_row(part.name, f"{part.parameters:,}", share, f"{part.activated:,}")
    table.add_section()
    table.add_row("total", f"{numbers.parameters:,}", "", "")
    table.add_row(
        "total without MTP", f"{numbers.parameters_without_mtp:,}", "", f"{numbers.activated_parameters:,}"
    )
    return table


def _memory_table(numbers: ModelInfo) -> Table:
    table = Table("one copy, before sharding", title="Training memory")
    for heading in ("fp32", "bf16"):
        table.add_column(heading, justify="right")
    optimizer = numbers.optimizer_bytes
    rows = [
        ("weights", numbers.weight_bytes(FLOAT32), numbers.weight_bytes(BFLOAT16)),
        ("main gradients (float32)", optimizer["main_gradients"], optimizer["main_gradients"]),
        ("master weights (float32)", 0, optimizer["master_weights_bf16"]),
        ("AdamW moments (float32)", optimizer["moments"], optimizer["moments"]),
    ]
    rows.append(("sum", *(sum(row[column] for row in rows) for column in (1, 2))))
    activations = [numbers.activation_bytes_per_token(element) for element in (FLOAT32, BFLOAT16)]
    for name, *sizes in [*rows, ("activations per token (estimate)", *activations)]:
        table.add_row(name, *map(_size, sizes), end_section=name.startswith(("AdamW", "sum")))
    return table


def _size(count: float) -> str:
    """Bytes as people read them: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:,.2f} TiB"


@app.command(epilog=NUMERICS_EXAMPLES)
def numerics(
    preset: Annotated[
        str | None, typer.Option("--numerics", help="Numerics preset; PADDLEDSV4_NUMERICS, or paddle, by default.")
    ] = None,
    op: Ops = None,
    layer_op: LayerOps = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Put the markdown table between the markers in this file.")
    ] = None,
) -> None:
    """List every numeric switch, ops before settings: variable, variants with the active one marked, spec, ULPs.

    ULPs: mean distance, in units of the last place, between Paddle's kernels (variant megatron) and torch's (variant
    torch) on the same numbers, forward / backward.
    """
    if as_json + markdown + (write is not None) > 1:
        raise UserError("choose one of --json, --markdown and --write")
    given = Overrides.from_texts(op, layer_op)
    prepare_paddle()
    from paddledsv4.numerics import table
    from paddledsv4.numerics.policy import Policy

    policy = Policy.from_env(preset, given)
    if write:
        table.update_file(write, table.as_markdown(policy))
    elif as_json:
        print(json.dumps(table.as_dict(policy), indent=2))
    elif markdown:
        print(table.as_markdown(policy))
    else:
        console = Console()
        console.print(table.as_table(policy))
        for rule in policy.layers:
            console.print(f"in some layers: {rule}", highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits 2 with one line on standard error for a :class:`UserError`."""
    try:
        launch = Launch.from_env()
        if launch.world_size > 1:
            name_rank(launch.rank)
        app(args=arguments, prog_name="paddledsv4")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
