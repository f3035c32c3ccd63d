"""A fingerprint of torch's kernels on this machine: name -> MD5 of the output on inputs that are the same anywhere.

Whether two machines compute the same bits depends on the instruction set that each library picks, on the number of
threads, and on versions. Rather than guess from those, the kernels that a training step uses are run on small inputs
whose shapes reach the different paths. The inputs are whole numbers made into floats by exact arithmetic, so no random
generator and no library function takes part in them.

``torch`` is an argument: a Megatron job has its own, and align takes the one that paddledsv4 computes with.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from align.hashing import tensor_md5

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
GEMMS = {"float32": ((64, 128, 64), (256, 128, 512), (512, 64, 24), (37, 53, 29), (1, 128, 8)),
         "bfloat16": ((64, 128, 64), (256, 128, 512), (37, 53, 29))}  # fmt: skip


def fingerprint(torch: ModuleType) -> dict[str, str]:
    """Run every kernel once, on the CPU; about 50 ms."""
    with torch.no_grad():
        return {name: _md5(torch, kernel()) for name, kernel in _kernels(torch).items()}


def record(torch: ModuleType) -> dict[str, Any]:
    """What a bundle keeps under ``source.kernel_fingerprint``: the machine, and the MD5 of every kernel's output."""
    return machine(torch) | {"kernels": fingerprint(torch)}


def machine(torch: ModuleType) -> dict[str, Any]:
    """What the kernels run on. ``cpu_capability`` is the instruction set that torch chose."""
    model, flags = _processor()
    return {
        "processor": model,
        "features": [feature for feature in FEATURES if feature in flags],
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> tuple[str, set[str]]:
    """Name and features of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return said.get("model name") or platform.machine(), set(said.get("flags", said.get("Features", "")).split())


def _numbers(torch: ModuleType, shape: tuple[int, ...], salt: int, dtype: str = "float32"):
    """Multiples of 2**-23 in [-1, 1) that look random, [*shape]: Knuth's multiplicative hash of the place.

    All 24 bits of a float32 are in use, so that every sum and product rounds.
    """
    count = 1
    for size in shape:
        count *= size
    place = torch.arange(count, dtype=torch.int64) + 1_000_003 * salt
    mixed = (place * 2_654_435_761) % 2**32 // 2**8
    return (mixed.to(torch.float32) / 2**23 - 1).reshape(shape).to(getattr(torch, dtype))


def _kernels(torch: ModuleType) -> dict[str, Callable[[], Any]]:
    x, y = _numbers(torch, (64, 512), 1), _numbers(torch, (64, 512), 2)
    odd, positive = _numbers(torch, (33, 257), 3), _numbers(torch, (64, 512), 4) + 1.5
    half = _numbers(torch, (64, 512), 5, "bfloat16")
    wide = 8 * x  # beyond [-1, 1): exp and friends take other branches there
    large = _numbers(torch, (1 << 17,), 10)  # enough for several threads to share
    index = torch.arange(128, dtype=torch.int64) * 7 % 16
    functions = {
        "exp": lambda: wide.exp(), "log": lambda: positive.log(), "sqrt": lambda: positive.sqrt(),
        "rsqrt": lambda: positive.rsqrt(), "sin": lambda: wide.sin(), "cos": lambda: wide.cos(),
        "sigmoid": lambda: wide.sigmoid(), "divide": lambda: x / positive,
        "silu": lambda: torch.nn.functional.silu(wide), "softplus": lambda: torch.nn.functional.softplus(wide),
        "logaddexp": lambda: torch.logaddexp(wide, y), "lerp": lambda: torch.lerp(x, y, 0.1),
        "addcdiv": lambda: torch.addcdiv(x, y, positive, value=-1e-3),
        "softmax": lambda: torch.softmax(wide, -1), "softmax_odd": lambda: torch.softmax(odd, -1),
        "softmax_bfloat16": lambda: torch.softmax(half, -1), "log_softmax": lambda: torch.log_softmax(wide, -1),
        "logsumexp": lambda: torch.logsumexp(wide, -1), "sum": lambda: x.sum(), "sum_rows": lambda: x.sum(-1),
        "sum_columns": lambda: x.sum(0), "sum_odd": lambda: odd.sum(-1), "sum_bfloat16": lambda: half.sum(-1),
        "sum_large": lambda: large.sum(), "norm_large": lambda: torch.norm(large),
        "mean": lambda: x.mean(-1), "norm": lambda: torch.norm(x), "norm_rows": lambda: x.norm(dim=-1),
        "cumsum": lambda: odd.cumsum(-1), "rms_norm": lambda: torch.nn.functional.rms_norm(x, (512,), y[0], 1e-6),
        "index_add": lambda: torch.zeros(16, 256).index_add(0, index, x.reshape(128, 256)),
        "bmm_float32": lambda: torch.bmm(_numbers(torch, (6, 40, 32), 6), _numbers(torch, (6, 32, 40), 7)),
        "bmm_bfloat16": lambda: torch.bmm(
            _numbers(torch, (6, 40, 32), 8, "bfloat16"), _numbers(torch, (6, 32, 40), 9, "bfloat16")
        ),
    }  # fmt: skip
    for dtype, shapes in GEMMS.items():
        for salt, (m, k, n) in enumerate(shapes, 20):
            a, b = _numbers(torch, (m, k), salt, dtype), _numbers(torch, (n, k), salt + 50, dtype)
            functions[f"gemm_{dtype}_{m}x{k}x{n}"] = lambda a=a, b=b: a @ b.t()
    return functions


def _md5(torch: ModuleType, tensor) -> str:
    return tensor_md5(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
