"""What one rank of a Megatron job recorded, and the bundle that it becomes. Imports neither torch nor Megatron."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from align.capture.describe import model_section, parallel_sections, training_section
from align.capture.kernels import kernel_fingerprint
from align.capture.selection import Selection
from align.capture.store import Folder, trace_folder
from align.logwriter import LossLogWriter
from paddledsv4.errors import UserError
from paddledsv4.host import BITWISE_ENVIRONMENT

FORMAT = 1
HC_EPS = 1e-6  # Megatron keeps it as a constant of HyperConnectionModule


@dataclass
class MicrobatchRecord:
    """tokens [b, s+1]; per-token losses [b, s]; mean losses as float32 scalars, ``mtp`` None without MTP."""

    tokens: np.ndarray
    per_token: np.ndarray
    main: np.ndarray
    mtp: np.ndarray | None


class JobRecord:
    """Collects steps and microbatches, and writes traces as the steps end."""

    def __init__(self, out: Path, selection: Selection, steps: int, training: dict[str, Any]) -> None:
        self.selection, self.steps, self.training = selection, steps, training
        self.state = sys.modules.get("megatron.core.parallel_state")
        if self.state is not None and not self.state.model_parallel_is_initialized():
            self.state = None
        distributed = sys.modules["torch"].distributed if "torch" in sys.modules else None
        up = distributed is not None and distributed.is_available() and distributed.is_initialized()
        world, rank = (distributed.get_world_size(), distributed.get_rank()) if up else (1, 0)
        self.parallel, self.rank = parallel_sections(self.state, world, rank)
        self.name = out.name
        self.folder = Folder(out if world == 1 else out / f"rank{rank:05d}")
        self.initial: dict[str, np.ndarray] = {}
        self.optimizer: Any = None
        self.step, self.microbatches = 1, []
        self.steps_done: list[list[MicrobatchRecord]] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.seconds: list[float] = []
        self.notes: dict[str, None] = {}  # each once, in order
        self._traces: dict[int, Any] = {}

    def wants_trace(self) -> bool:
        """Whether the microbatch that comes next is traced."""
        return self.step in self.selection.steps and len(self.microbatches) in self.selection.microbatches

    def add(self, microbatch: MicrobatchRecord, trace: Any) -> None:
        """A forward pass is over; its backward may still come."""
        if trace is not None:
            self._traces[len(self.microbatches)] = trace
        self.microbatches.append(microbatch)

    def end_step(self, rate: float, norm: float, gradients: dict, state: dict, after: dict) -> None:
        """Write the traces of the step that the optimizer has just done.

        Raises:
            UserError: it had another number or size of microbatches than the first.
        """
        for index, trace in self._traces.items():
            self._write_trace(trace_folder(self.step, index), index, trace, norm)
        where, only = trace_folder(self.step), self.selection.only
        if gradients:
            self.folder.tensors(f"{where}/param_grads", only(gradients), norms=True)
        if state:
            wanted = {name: t for name, t in state.items() if self.selection.wants(name.split("/", 1)[1])}
            self.folder.tensors(f"{where}/optimizer", wanted)
        if after:
            self.folder.json(f"{where}/after_step{self.step}.json", after)
        done = [m.tokens.shape for m in self.microbatches]
        if self.steps_done and done != [m.tokens.shape for m in self.steps_done[0]]:
            raise UserError(f"capture: step {self.step} has microbatches {done}, unlike step 1; keep their size fixed")
        self.steps_done.append(self.microbatches)
        self.norms.append(norm)
        self.rates.append(rate)
        self.step, self.microbatches, self._traces = self.step + 1, [], {}

    def _write_trace(self, where: str, index: int, trace: Any, norm: float) -> None:
        microbatch, what = self.microbatches[index], self.selection.what
        absent = trace.not_seen()
        if absent:
            self.notes[f"{len(absent)} names of the trace were never seen, such as {', '.join(absent[:3])}"] = None
        ends = {"per_token_loss": microbatch.per_token, "main_loss_mean": microbatch.main}
        if microbatch.mtp is not None:
            ends["mtp_loss_mean"] = microbatch.mtp
        ends[f"grad_norm_step{self.step}"] = np.float64(norm).reshape(())
        if "forward" in what:
            self.folder.tensors(f"{where}/forward", trace.forward | self.selection.only(ends))
        if "gradients" in what:
            self.folder.tensors(f"{where}/activation_grads", trace.gradients, norms=True)
        if "choices" in what:
            trace.choices.write(self.folder, where)

    def write(self, model: Any, torch: ModuleType, final: dict[str, np.ndarray], final_md5: str) -> Path:
        """Complete the bundle and give it its name; returns where it is."""
        if len(set(self.rates)) > 1 and "schedule" not in self.training.get("optimizer", {}):
            low, high = min(self.rates), max(self.rates)
            self.notes[
                f"the learning rate went from {low:g} to {high:g}, but bundle.json says constant: tell the schedule by "
                'capture(..., training={"optimizer": {"schedule": ..., "lr": ...}})'
            ] = None
        with self.folder as folder:
            folder.weights("init.safetensors", self.initial)
            rows = [m.tokens for step in self.steps_done for m in step]
            np.save(folder.hidden / "tokens.npy", np.concatenate(rows).astype(np.int32))
            folder.json("bundle.json", self._description(model, torch))
            if self.parallel["world_size"] > 1:  # align merge hashes what it has put together
                folder.weights("final.safetensors", final)
            with LossLogWriter(folder.hidden / "losses.jsonl", {"captured": self.name} | self.rank) as log:
                for step, (microbatches, norm) in enumerate(zip(self.steps_done, self.norms, strict=True), 1):
                    for index, m in enumerate(microbatches):
                        mtp = None if m.mtp is None else float(m.mtp)
                        log.losses(step, index, self.rank["data"], float(m.main), mtp)
                    log.grad_norm(step, norm)
                log.final_weights(final_md5)
        return folder.path

    def _description(self, model: Any, torch: ModuleType) -> dict[str, Any]:
        first = self.steps_done[0][0].tokens.shape
        eps = [module.compute_h_eps for module in model.modules() if hasattr(module, "compute_h_eps")]
        training = training_section(
            model.config, self.optimizer, self.rates, (first[0], first[1] - 1), len(self.steps_done[0])
        )
        described = {
            "format": FORMAT,
            "name": self.name,
            "source": self._source(torch),
            "model": model_section(model.config, model.vocab_size, eps[0] if eps else HC_EPS),
            "training": _updated(training, self.training),
            "parallel": self.parallel,
            "data": {"tokens": "tokens.npy [rows, sequence_length + 1]; loss mask all ones"},
        }
        if self.parallel["world_size"] > 1:
            split = {n: getattr(p, "partition_dim", -1) for n, p in model.named_parameters()
                     if getattr(p, "tensor_model_parallel", False)}  # fmt: skip
            described["rank"] = self.rank | {"split": split}
        return described

    def _source(self, torch: ModuleType) -> dict[str, Any]:
        core = sys.modules.get("megatron.core")
        return {
            "trainer": f"NVIDIA Megatron-LM, megatron.core {getattr(core, '__version__', 'of unknown version')}",
            "torch": torch.__version__,
            "environment": {name: os.environ[name] for name in BITWISE_ENVIRONMENT if name in os.environ},
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "capture": {
                "steps": list(self.selection.steps),
                "microbatches": list(self.selection.microbatches),
                "names": list(self.selection.names),
                "what": list(self.selection.what),
                "capture_seconds": [round(s, 4) for s in self.seconds],
                "learning_rates": self.rates,
                "notes": list(self.notes),
            },
        } | kernel_fingerprint(torch)


def _updated(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``section`` with ``changes``, subsections merged likewise."""
    merged = {k: _updated(section[k], v) if isinstance(v, dict) and isinstance(section.get(k), dict) else v
              for k, v in changes.items()}  # fmt: skip
    return section | merged
