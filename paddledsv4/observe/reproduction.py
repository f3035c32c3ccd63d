"""One call of an op as a file: arguments, the gradients that its results received, and what it gave.

A safetensors file. The entry ``paddledsv4`` of its metadata is JSON: where the call was made, the variant, the whole
policy, and the arguments as a tree with names of tensors for leaves. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import paddle
from paddle import Tensor
from safetensors import SafetensorError, safe_open
from safetensors.paddle import load_file

from paddledsv4.config.base import StrictConfig
from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.observe.files import write_tensors
from paddledsv4.observe.replay import Call

FORMAT, KEY = 1, "paddledsv4"


class Origin(StrictConfig):
    """Where and how a call was made.

    ``variant`` is its name in the table of ops, "" for a function that stands in none; ``policy`` is op -> variant of
    the run, ``preset`` its name. ``found``: in words, what was not finite. ``ranks``: how many ranks the op exchanges
    tensors with, itself included; above 1 it cannot run alone.
    """

    SECTION: ClassVar[str] = "origin."

    op: str
    path: str
    step: int
    microbatch: int
    rank: int
    direction: Literal["forward", "backward"]
    variant: str
    precision: Literal["fp32", "bf16", "fp64"]
    found: str
    preset: str = ""
    ranks: int = 1
    policy: dict[str, str] = {}


@dataclass
class Reproduction:
    """A call that can be run again, and what it gave the first time: ``outputs``, and ``gradients`` of its inputs by
    their position among those that want one."""

    call: Call
    origin: Origin
    outputs: dict[int, Any] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the file, whole or not at all, and return its path.

        Raises:
            UserError: the disk refuses.
        """
        tensors: dict[str, Tensor] = {}
        described = {
            "format": FORMAT, "origin": self.origin.model_dump(mode="json"), "in_graph": self.call.in_graph,
            "args": _encode(self.call.args, "args", tensors), "kwargs": _encode(self.call.kwargs, "kwargs", tensors),
            "outputs": _encode(self.outputs, "outputs", tensors),
        }  # fmt: skip
        tensors |= {f"arrived.{i}": g for i, g in self.call.gradients.items()}
        tensors |= {f"gradients.{i}": g for i, g in self.gradients.items()}
        return write_tensors(path, tensors, {KEY: json.dumps(described)})


def read(path: Path) -> Reproduction:
    """The call in a file.

    Raises:
        UserError: it is missing, damaged, or no file of this kind.
    """
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise UserError(f"{path}: is no reproduction of an op; --check-finite full writes such files")
        described, tensors = json.loads(text), load_file(path)
        if described["format"] != FORMAT:
            raise UserError(f"{path}: has format {described['format']}, this paddledsv4 reads {FORMAT}")
        origin = Origin.from_dict(described["origin"], where=str(path))
        args, kwargs, outputs = (_decode(described[name], tensors) for name in ("args", "kwargs", "outputs"))
        arrived, gradients = (
            {int(name[len(kind) :]): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("arrived.", "gradients.")
        )
        call = Call(origin.op, origin.path, args, kwargs, bool(described["in_graph"]), arrived)
        return Reproduction(call, origin, {int(i): x for i, x in outputs.items()}, gradients)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is damaged or no reproduction of an op ({_first_line(error)})") from None


# ---- arguments as JSON: {"kind": content}, tensors by name ----------------------------------------------------------


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "dtype": str(value.dtype).removeprefix("paddle."), "shape": list(value.shape),
                "wants_gradient": not value.stop_gradient}  # fmt: skip
    if isinstance(value, dict):
        return {"mapping": {str(k): _encode(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"not_finite": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, Group):
        return {"group": value.name}
    if isinstance(value, paddle.dtype):
        return {"dtype_name": str(value).removeprefix("paddle.")}
    return {"unknown": type(value).__name__}


def _decode(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in tree:
        tensor = tensors[tree["tensor"]]
        tensor.stop_gradient = not tree["wants_gradient"]
        return tensor
    if "mapping" in tree:
        return {name: _decode(branch, tensors) for name, branch in tree["mapping"].items()}
    if "list" in tree or "tuple" in tree:
        (kind, branches), = tree.items()
        return {"list": list, "tuple": tuple}[kind](_decode(branch, tensors) for branch in branches)
    if "not_finite" in tree:
        return float(tree["not_finite"])
    if "group" in tree:
        return Group(tree["group"])
    if "dtype_name" in tree:
        return getattr(paddle, tree["dtype_name"])
    if "unknown" in tree:
        raise UserError(f"this call has an argument of type {tree['unknown']}, which a file cannot hold")
    return tree["value"]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
