"""Read a safetensors file into numpy, bf16 included (numpy has no bf16, so those come as float32)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from paddledsv4.errors import UserError

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_tensors(path: Path, widen: bool = True) -> dict[str, np.ndarray]:
    """Name -> array, writable. bf16 is widened to float32, which is exact; other dtypes stay as they are.

    Without ``widen``, bf16 comes as the uint16 of its bits.

    Raises:
        UserError: the file is missing, truncated, no safetensors file, or has a dtype that numpy lacks.
    """
    try:
        entries = deserialize(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch the bundle again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); fetch the bundle again"
        ) from None
    return {name: _array(path, name, entry, widen) for name, entry in entries}


def _array(path: Path, name: str, entry: dict, widen: bool) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']}; align reads {', '.join(DTYPES)}")
    array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16" and widen:  # a bf16 number is the upper half of the float32 with the same value
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array
