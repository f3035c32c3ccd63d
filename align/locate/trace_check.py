"""Whether the reference preset gives the bundle's own recorded tensors, bit for bit, and if not, where not first."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import paddle

from align.bundle import Bundle
from align.capture.store import as_float
from align.hashing import tensor_md5
from align.trace import Tracer, taps_of
from paddledsv4.errors import UserError
from paddledsv4.training.data import batches
from paddledsv4.training.step import auxiliary_losses, microbatch_gradients
from paddledsv4.training.trainer import Trainer


@dataclass(frozen=True)
class TraceCheck:
    """``equal`` of ``compared`` tensors of the first microbatch; ``first`` different one in execution order, and
    ``site``, the layer and op that made it. All tensors before it are equal, so are its inputs."""

    compared: int
    equal: int
    first: str | None = None
    site: str | None = None


def check_trace(bundle: Bundle, trainer: Trainer) -> TraceCheck | None:
    """Forward, then backward of step 1, microbatch 0; None when the bundle has no trace.

    Raises:
        UserError: a trace file is malformed.
    """
    folder = bundle.path / "trace"
    if not (folder / "forward.json").is_file():
        return None
    with Tracer(trainer.model) as tracer:
        rows = batches(bundle.tokens, 0, 0, 0, bundle.training, trainer.parallel)
        inputs, labels = (paddle.to_tensor(x, dtype="int64") for x in rows)
        mask = paddle.ones(labels.shape, "float64" if trainer.precision == "fp64" else "float32")
        microbatch_gradients(trainer.model, auxiliary_losses(bundle.training), inputs, labels, mask)
    sites = {tap.name: f"{tap.layer}: {tap.op}" if tap.op else tap.layer for tap in taps_of(trainer.model)}
    compared = equal = 0
    first = site = None
    for kind, ours in (("forward", tracer.forward), ("activation_grads", tracer.gradients)):
        for name, md5 in _md5s(folder / f"{kind}.json").items():
            if name not in ours:
                continue
            compared += 1
            if tensor_md5(ours[name]) == md5 and not _has_nan(ours[name]):
                equal += 1
            elif first is None:
                first, site = f"{kind} {name}", sites.get(name.partition("#")[0])
    return TraceCheck(compared, equal, first, site)


def _has_nan(tensor: np.ndarray) -> bool:
    """A NaN equals nothing, though its MD5 may."""
    return bool((as_float(tensor) != as_float(tensor)).any())


def _md5s(path) -> dict[str, str]:
    try:
        return {name: entry[2] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path} is no list of shapes, dtypes and MD5s; capture the bundle again") from None
