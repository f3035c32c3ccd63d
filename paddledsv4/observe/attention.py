"""Record what passes through attention: query and key as the core gets them, its output, and each step after it.

The names are those of a trace (:mod:`paddledsv4.weights.names.trace`), so that files of other runs, and of Megatron,
can be held against them::

    core.query      query after rope [s, b, H, D]
    core.key        key and value after rope, and quantised where that is on [n, b, D]
    core.out        output of sparse attention [s, b, H*D]
    grouped_o.in    the same after the inverse rope
    grouped_o.out   after the grouped output projection
    out             after the second one, summed over tensor ranks [s, b, C]
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import paddle
from paddle import Tensor, nn

from paddledsv4.config.observe import AttentionTraceConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.rules import glob_matches
from paddledsv4.observe.files import write_tensors
from paddledsv4.observe.ops import OpCall, OpObserver, watch_ops
from paddledsv4.observe.steps import StepObserver
from paddledsv4.transformer.attention import Attention
from paddledsv4.weights.names import Traced, traced

if TYPE_CHECKING:
    from paddledsv4.training.step import StepResult
    from paddledsv4.training.trainer import Trainer

TENSORS = ("core.query", "core.key", "core.out", "grouped_o.in", "grouped_o.out", "out")


class AttentionTrace(OpObserver, StepObserver):
    """Writes ``folder``/trace/stepN-rankR.safetensors for every step that ``config`` wants.

    Raises:
        UserError: its glob means no attention layer of this model.
    """

    def __init__(self, trainer: Trainer, config: AttentionTraceConfig, folder: Path):
        self.trainer, self.config, self.folder = trainer, config, folder / "trace"
        self.layers = attention_layers(trainer.model, config.layers)
        rows = rows_of(trainer.model.config, self.layers)
        self.results = {row.paddle.layer: row.name for row in rows if row.paddle.call is None}
        self.calls: dict[tuple[str, str], list[Traced]] = {}
        for row in rows:
            if row.paddle.call is not None:
                self.calls.setdefault((row.paddle.layer, row.paddle.call), []).append(row)
        self.tensors: dict[str, Tensor] = {}
        self._microbatch, self._times = 0, Counter()
        self._watching = contextlib.ExitStack()

    def begin_step(self, step: int) -> None:
        if not self.config.wants(step):
            return
        self._watching.enter_context(watch_ops(self.trainer.model, self, {op for _, op in self.calls}))
        for path, name in self.results.items():
            hook = self.layers[path].register_forward_post_hook(lambda _, inputs, out, name=name: self._keep(name, out))
            self._watching.callback(hook.remove)

    def begin_microbatch(self, index: int) -> None:
        self._microbatch, self._times = index, Counter()

    def end_step(self, result: StepResult) -> None:
        """Write what was recorded.

        Raises:
            UserError: the disk refuses.
        """
        self.close()
        if self.tensors:
            rank = self.trainer.groups.world.rank
            path = self.folder / f"step{result.step:06}-rank{rank}.safetensors"
            write_tensors(path, self.tensors, {"order": json.dumps(list(self.tensors))})  # that of the forward pass
            self.tensors = {}

    def close(self) -> None:
        """Look no more."""
        self._watching.close()

    def after(self, call: OpCall, outputs: tuple) -> None:
        for row in self.calls.get((call.path, call.op), ()):
            self._keep(row.name, (call.args if row.paddle.side == "in" else outputs)[row.paddle.position])

    def _keep(self, name: str, tensor: Tensor) -> None:
        """A copy under the name; a second pass through the same place is NAME#2, as for documents of other lengths."""
        self._times[name] += 1
        again = f"#{self._times[name]}" if self._times[name] > 1 else ""
        with paddle.no_grad():
            self.tensors[f"mb{self._microbatch}/{name}{again}"] = tensor.detach().cpu().clone()


def attention_layers(model: nn.Layer, glob: str) -> dict[str, Attention]:
    """path -> attention layer for those that the glob means.

    Raises:
        UserError: it means none.
    """
    layers = {path: layer for path, layer in model.named_sublayers() if isinstance(layer, Attention)}
    chosen = {path: layer for path, layer in layers.items() if glob_matches(glob, path)}
    if not chosen:
        raise UserError(f"observe.trace_attention.layers = {glob!r}: matches no attention layer; "
                        f"there are: {', '.join(layers)}")
    return chosen


def rows_of(config, layers: dict[str, Attention]) -> list[Traced]:
    """The rows of the table of traces that are recorded of these layers."""
    wanted = {f"{path}.{name}" for path in layers for name in TENSORS}
    return [row for row in traced(config.num_hidden_layers, config.num_nextn_predict_layers) if row.name in wanted]
