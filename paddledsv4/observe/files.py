"""Tensors as a file that is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paddle import Tensor
from safetensors import SafetensorError
from safetensors.paddle import save_file

from paddledsv4.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file and return its path; its folder is made.

    Raises:
        UserError: the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, dict(metadata))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return path
