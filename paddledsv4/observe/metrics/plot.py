"""One page of curves from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paddledsv4.observe.metrics.log import Record

NAMED_LAYERS = 8  # at most so many are in the legend


@dataclass(frozen=True)
class Panel:
    """Curves of the tags in ``groups``, one for each layer where there are layers.

    A dashed line is the second group's. ``log``: a logarithmic axis, if all values are above zero.
    """

    title: str
    groups: tuple[str, ...]
    log: bool = False


PANELS = (
    Panel("loss (nats per token)", ("loss/main", "loss/mtp", "loss/held_out")),
    Panel("gradient norm", ("optimizer/grad_norm",), log=True),
    Panel("learning rate", ("optimizer/learning_rate",)),
    Panel("tokens per second", ("speed/tokens_per_second",)),
    Panel("memory of the fullest rank (MiB)",
          ("memory/host_now_mib", "memory/host_peak_mib", "memory/device_now_mib", "memory/device_peak_mib")),
    Panel("router: busiest expert over mean", ("router/max_over_mean",)),
    Panel("router: experts without a token", ("router/empty_share",)),
    Panel("expert bias: largest, smallest (dashed)", ("expert_bias/max", "expert_bias/min")),
    Panel("mHC: worst row sum, column sum (dashed)", ("mhc/row_sum_error", "mhc/column_sum_error"), log=True),
    Panel("attention: share of the sink", ("attention/sink_share",)),
    Panel("indexer loss (nats per query)", ("indexer/loss",)),
    Panel("indexer recall: weight, entries (dashed)", ("indexer/recall_weight", "indexer/recall_entries")),
)  # fmt: skip
COLUMNS = 4


def layers_of(records: list[Record]) -> list[str]:
    """Layers in the order of their numbers, those of multi-token prediction last."""
    found = {tag.split("/")[2] for record in records for tag in record if tag.count("/") == 2}
    numbers = {layer: [int(part) for part in layer.split(".") if part.isdecimal()] for layer in found}
    return sorted(found, key=lambda layer: (layer.startswith("mtp"), numbers[layer], layer))


def draw_metrics(records: list[Record], path: Path) -> None:
    """Draw every panel that there is something for, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = layers_of(records)
    colors = {layer: colormaps["viridis"](i / max(len(layers) - 1, 1) * 0.9) for i, layer in enumerate(layers)}
    panels = [panel for panel in PANELS if any(True for _ in _curves(panel, records, layers))]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(16, 3.3 * rows + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, list(_curves(panel, records, layers)), colors)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    named = layers if len(layers) <= NAMED_LAYERS else [
        layers[i * (len(layers) - 1) // (NAMED_LAYERS - 1)] for i in range(NAMED_LAYERS)
    ]  # fmt: skip
    if named:
        handles = [Line2D([], [], color=colors[layer], label=layer) for layer in named]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(named), fontsize="small", frameon=False)
    part = path.with_suffix(".part")
    figure.savefig(part, format="png")
    part.replace(path)


def _curves(panel: Panel, records: list[Record], layers: list[str]) -> Iterator[tuple[str, str, list, list]]:
    """(group, layer or "", steps, values) of every curve that has a point."""
    for group in panel.groups:
        for layer in ("", *layers):
            tag = f"{group}/{layer}" if layer else group
            points = [(record["step"], record[tag]) for record in records if tag in record]
            if points:
                yield group, layer, *map(list, zip(*points, strict=True))


def _draw(axes, panel: Panel, curves: list, colors: dict) -> None:
    plain = [curve for curve in curves if not curve[1]]
    for group, layer, steps, values in curves:
        style = {"color": colors[layer]} if layer else {"label": group.split("/")[1].replace("_", " ")}
        dashed = bool(layer) and group != panel.groups[0]
        marker = "." if len(steps) < 3 or group == "loss/held_out" else None
        axes.plot(steps, values, linewidth=1.1, linestyle="--" if dashed else "-", marker=marker, **style)
    if panel.log and all(value > 0 for *_, values in curves for value in values):
        axes.set_yscale("log")
    if len(plain) > 1:
        axes.legend(fontsize="small")
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("step", fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize="small")
