"""What the released model would send on many cards, from the formulas that ``benchmarks/parallel.py`` holds against
counted bytes. On paper: nothing of it has been run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from benchmarks.layout_bytes import Job, least, sent
from benchmarks.parallel import layout
from paddledsv4.config import ModelConfig
from paddledsv4.info import model_info
from paddledsv4.weights.names import tensors

EXAMPLES = """Examples:

    python benchmarks/scale.py

    python benchmarks/scale.py --layouts dp64-ep64,dp16-ep64-tp4-et1-sp --length 65536 --tokens 8388608
"""
DEFAULT = "dp64-ep64,dp16-ep64-tp4-et1-sp,dp8-ep64-cp8,dp1024-ep64,dp256-ep64-tp4-et1-sp,dp128-ep64-cp8"


def main(
    config: Annotated[Path, typer.Option(help="A config.json or recipe.")] = Path("configs/flash.yaml"),
    layouts: Annotated[str, typer.Option(help="With commas; as of benchmarks/parallel.py.")] = DEFAULT,
    tokens: Annotated[int, typer.Option(help="Tokens of the global batch.")] = 1 << 25,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1 << 15,
    bandwidth: Annotated[float, typer.Option(help="GB/s that a card sends.")] = 50.0,
    rate: Annotated[float, typer.Option(help="TFLOP/s of a card, of matrix products in the model.")] = 400.0,
) -> None:
    """A Markdown table of bytes and seconds per card and step."""
    model = ModelConfig.from_file(config)
    shapes = {name: tensor.shape for name, tensor in tensors(model, "paddledsv4").items()}
    active = model_info(model).activated_parameters
    print("| layout | cards | group | GB per card and step | least | seconds | compute, seconds |")
    print("|---|---|---|---|---|---|---|")
    for text in layouts.split(","):
        parallel = layout(text)
        cards = parallel.world_size
        job = Job(model, shapes, parallel, tokens, length, activation=2)
        floor, compute = least(job), 6 * active * tokens / cards / rate / 1e12
        for index, (kind, size) in enumerate(sent(job).items()):
            first = (text, str(cards)) if index == 0 else ("", "")
            each, low = (x / cards / 1e9 for x in (size, floor[kind]))
            last = f"{compute:.1f}" if index == 0 else ""
            print(f"| {first[0]} | {first[1]} | {kind} | {each:.2f} | {low:.2f} | {each / bandwidth:.2f} | {last} |")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog=EXAMPLES)(main)
    app()
