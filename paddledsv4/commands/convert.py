"""``paddledsv4 convert``: a checkpoint from one format to another."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from paddledsv4.config import ModelConfig
from paddledsv4.config.files import read_model_section
from paddledsv4.weights.convert import Conversion
from paddledsv4.weights.convert import convert as write
from paddledsv4.weights.source import Source, without_mtp
from paddledsv4.weights.writer import shards

EXAMPLES = """[bold]Examples[/bold]

  paddledsv4 convert DeepSeek-V4-Flash flash-bf16 --to paddledsv4 --dtype bf16 --dry-run

  paddledsv4 convert DeepSeek-V4-Flash flash --to paddledsv4 --verify

  paddledsv4 convert runs/trained released --from paddledsv4 --to released --dtype released

  paddledsv4 convert DeepSeek-V4-Flash tuned --to paddledsv4 --dtype bf16 --adapter runs/tuned/adapter

  paddledsv4 convert flash-bf16 flash-hf --to hf --without-mtp"""

Format = Literal["released", "megatron", "hf", "paddledsv4"]
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # go along


def convert(
    source: Annotated[Path, typer.Argument(help="A folder of safetensors files, or one file.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    origin: Annotated[
        Format | None, typer.Option("--from", help="The format of SRC; without, its names show it.")
    ] = None,
    dtype: Annotated[
        Literal["keep", "bf16", "released"],
        typer.Option(help="keep: every byte as it is; bf16: unpacked; released: FP8 and FP4 as DeepSeek has them."),
    ] = "keep",
    config: Annotated[Path | None, typer.Option(help="The model's config.json, if SRC has none.")] = None,
    no_mtp: Annotated[bool, typer.Option("--without-mtp", help="Leave out MTP layers.")] = False,
    shard_size: Annotated[float, typer.Option(min=0, help="Largest file, in GB.")] = 5.0,
    adapter: Annotated[
        Path | None, typer.Option(help="A folder with LoRA adapters, which are added to the weights.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read DST back and compare every byte.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check names, shapes and dtypes, print sizes, write nothing.")
    ] = False,
) -> None:
    """Convert a checkpoint between DeepSeek's files, Megatron's names, transformers' names and ours.

    Formats: [bold]released[/] (DeepSeek's), [bold]megatron[/] (grouped experts; both spellings are read),
    [bold]hf[/] (transformers), [bold]paddledsv4[/] (ours: Megatron's names, experts apart). All are safetensors with
    model.safetensors.index.json. What is missing, extra or misshapen is an error. An interrupted call goes on where it
    stopped when it is given again; DST appears when all of it is there.
    """
    console, start = Console(highlight=False), time.monotonic()
    where = config or (source if source.is_dir() else source.parent)
    model, (values, _) = ModelConfig.from_file(where), read_model_section(where)
    with _open(source, model, origin, not no_mtp, dry_run) as opened:
        conversion = _conversion(opened, to, dtype, adapter)
        limit = max(int(shard_size * 1e9), 1)
        if dry_run:
            _sizes(conversion, limit, console)
            return
        also = tuple(where / name for name in BESIDE if where.is_dir() and (where / name).is_file())
        size = sum(entry.size for _, entry in conversion.entries())
        files = _write(conversion, target, values, limit, verify, also, size)
    seconds = time.monotonic() - start
    checked = ", every byte compared" if verify else ""
    count = f"{len(conversion.tensors):,} tensors, {_gb(size)} in {files} files"
    console.print(f"{target}: {count}{checked}, {seconds:.1f} s", soft_wrap=True)


def _conversion(source: Source, to: Format, dtype: str, adapter: Path | None) -> Conversion:
    if adapter is None:
        return Conversion(source, to, dtype)
    from paddledsv4.sft.adapter import SavedAdapter  # imports Paddle
    from paddledsv4.sft.merge import MergedConversion

    return MergedConversion(source, to, dtype, SavedAdapter.read(adapter))


def _open(source: Path, model: ModelConfig, origin: Format | None, mtp: bool, dry_run: bool) -> Source:
    """The source. For a dry run its weights may be elsewhere: then the rule of the released files says what it has."""
    if dry_run and source.is_dir() and not any(source.glob("*.safetensors")):
        return Source.by_rule(source, model if mtp else without_mtp(model), origin or "released")
    return Source.open(source, model, origin, mtp)


def _write(conversion, target, values, limit, verify, also, size) -> int:
    """Convert, with progress on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("converting", total=size * (2 if verify else 1))
        try:
            return write(
                conversion, target, values, limit, verify, wrote=lambda n: progress.advance(task, n), also=also
            )
        except KeyboardInterrupt:
            progress.stop()
            Console(stderr=True).print("stopped by Ctrl-C; the same command goes on from here")
            raise typer.Exit(130) from None


def _sizes(conversion: Conversion, limit: int, console: Console) -> None:
    """Bytes per part of the model and dtype of the target."""
    entries = list(conversion.entries())
    sizes, count = Counter(), Counter()
    for tensor, entry in entries:
        part = tensor.atoms[0].part
        sizes[part, entry.dtype] += entry.size
        count[part] += 1
    dtypes = sorted({dtype for _, dtype in sizes}, key=lambda dtype: -sum(sizes[p, dtype] for p in count))
    table = Table(title=f"{conversion.source.format} to {conversion.format}, --dtype {conversion.dtype}")
    table.add_column("part", no_wrap=True)
    for heading in ("tensors", *dtypes, "all"):
        table.add_column(heading, justify="right")
    for part in count:
        row = [sizes[part, dtype] for dtype in dtypes]
        table.add_row(part, f"{count[part]:,}", *map(_gb, row), _gb(sum(row)))
    table.add_section()
    totals = [sum(sizes[part, dtype] for part in count) for dtype in dtypes]
    table.add_row("total", f"{len(entries):,}", *map(_gb, totals), _gb(sum(totals)))
    console.print(table)
    files = len(shards([entry for _, entry in entries], limit))
    console.print(f"{sum(totals):,} bytes in {files} files; nothing was written")


def _gb(size: int) -> str:
    """Bytes in the unit that people use for files: 1.5 GB is 1,500,000,000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B" if size else "-"
